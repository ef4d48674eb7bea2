"""MkDocs' hook: puts pages from outside docs/ into the manual, and makes every link fit.

`mkdocs.yml` names this file. Links in the repository's pages lead to files of the checkout. In the manual a link to a
page leads to that page. A link to any other file leads to `repo_url`, or is its path in words where there is none.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from tools.manual import reference

ROOT = Path(__file__).parent.parent.parent
# The manual's name of each page that lies outside docs/.
OUTSIDE = {
    "dit_accel/kernels/README.md": "kernels/index.md",
    "dit_accel/kernels/block_sparse/README.md": "kernels/block_sparse.md",
    "dit_accel/kernels/router/README.md": "kernels/router.md",
    "dit_accel/kernels/sla/README.md": "kernels/sla.md",
    "dit_accel/kernels/tail/README.md": "kernels/tail.md",
    "dit_accel/pipelines/SUPPORT.md": "models/families.md",
    "dit_accel/pipelines/demo/README.md": "models/demo.md",
    "dit_accel/eval/demo_clip/README.md": "models/demo-clip.md",
    "CHANGELOG.md": "changelog.md",
}
SUPPORT, TESTED = "dit_accel/pipelines/SUPPORT.md", "models/tested.md"
ANCHOR = "what-is-tested-together"
CUT = "## What is tested together"  # SUPPORT.md is two pages of the manual
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FETCHED = re.compile(r"""<(?:script|link|img|source)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", flags=re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Both references stand at the end of the navigation."""
    config.nav = [*config.nav, *reference.navigation()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of OUTSIDE and the references."""
    from mkdocs.structure.files import File

    pages = {name: (ROOT / path).read_text(encoding="utf-8") for path, name in OUTSIDE.items()}
    families, tested = pages[OUTSIDE[SUPPORT]].split(CUT)
    pages |= {OUTSIDE[SUPPORT]: families, TESTED: f"# {CUT.removeprefix('## ')}{tested}"}
    for name, text in (pages | reference.pages()).items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page; what is in code stays."""
    here = page.file.src_uri
    pages = {file.src_uri for file in files.documentation_pages()}
    parts = CODE.split(_joined(markdown))
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(lambda link: fit(link["text"], link["target"], here, pages, config.repo_url), parts[i])
    return _parted("".join(parts))


def _joined(markdown: str) -> str:
    """Backquotes in the text of a link would part it: they are kept as a private character meanwhile."""
    return re.sub(r"\[`([^`\]\n]*)`\]\(", "[\ue000\\1\ue000](", markdown)


def _parted(markdown: str) -> str:
    return markdown.replace("\ue000", "`")


def source_of(page: str) -> str:
    """The path in the checkout of a page of the manual."""
    if page == TESTED:
        return SUPPORT
    return next((path for path, name in OUTSIDE.items() if name == page), f"docs/{page}")


def fit(text: str, target: str, here: str, pages: set[str], repository: str | None) -> str:
    """One Markdown link of the page `here`, so that it leads to the same place from the manual.

    Raises:
        FileNotFoundError: the checkout has no file of that name.
    """
    if re.match(r"[a-z]+:|#", target):
        return f"[{text}]({target})"
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(here)), path))
    if not (ROOT / path).exists():
        if posixpath.normpath(posixpath.join(posixpath.dirname(here), target.partition("#")[0])) in pages:
            return f"[{text}]({target})"  # a generated page
        raise FileNotFoundError(f"{source_of(here)} links to {target}, and there is no {path}.")
    name = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if path == SUPPORT and anchor == ANCHOR:
        name, anchor = TESTED, ""
    if name is not None:
        relative = posixpath.relpath(name, posixpath.dirname(here) or ".")
        return f"[{text}]({relative}{'#' + anchor if anchor else ''})"
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})"
    return text if posixpath.basename(path) in text else f"{text} (`{path}`)"


def on_post_build(config: Any) -> None:
    """No page may fetch anything from another host, so that the manual works without the network."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        fetched = FETCHED.search(path.read_text(encoding="utf-8"))
        if fetched:
            raise ValueError(f"{path.name} fetches from another host: {fetched[0]}. Ship the file, or leave it out.")
