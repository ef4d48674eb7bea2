"""The sdist makes the wheel, and the wheel holds everything and works where there is no checkout."""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGED = (".py", ".safetensors", ".json", ".yaml", ".md", ".j2", ".css", ".js")


def run(command, cwd, **environment) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, built from a copy of what it is made from, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("dit_accel", "tools", "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for door in ("kernels", "pipelines", "eval"):
        (source / door).symlink_to(f"dit_accel/{door}")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", source / "dist", source], source)
    (built,) = (source / "dist").glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the sdist alone, as the release does."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` folder of a virtual environment with the wheel in it.

    What the package depends on comes from this environment through a .pth file. Editable installs do not come with it:
    their own .pth files are not read from there.
    """
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    site = pathlib.Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run([*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel], folder)
    return environment / "bin"


def test_wheel_holds_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = (path for path in (ROOT / "dit_accel").rglob("*") if path.suffix in PACKAGED)
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert "dit_accel/py.typed" in names  # type checkers read the annotations


def test_the_metadata_says_what_the_project_says(wheel, sdist):
    from dit_accel import __version__

    assert wheel.name.startswith(f"dit_accel-{__version__}-") and sdist.name == f"dit_accel-{__version__}.tar.gz"
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"dit_accel-{__version__}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == project["license"]
    assert set(metadata.get_all("Provides-Extra")) == {
        name.replace("_", "-") for name in project["optional-dependencies"]
    }
    assert metadata.get_all("Classifier") == project["classifiers"]
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_wheel_holds_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert len(tops) == 2, tops
    assert "dit_accel" in tops


def test_installed_package_is_the_wheels(installed, tmp_path):
    where = run([installed / "python", "-c", "import dit_accel; print(dit_accel.__file__)"], tmp_path)
    assert pathlib.Path(where.strip()).is_relative_to(installed.parent)


def test_installed_package_generates(installed, tmp_path):
    if not (ROOT / "dit_accel" / "pipelines" / "demo" / "weights" / "model_index.json").exists():
        pytest.skip("the embedded model is not trained yet")
    size = ("--frames", 5, "--height", 64, "--width", 64, "--steps", 2)
    method = ("--method", "gna:window=0.5", "--compare")
    run([installed / "dit-accel", "generate", "--model", "demo", *size, *method, "--output", "a.mp4"], tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a-compare.mp4", "a-dense.mp4", "a.json", "a.mp4"]
