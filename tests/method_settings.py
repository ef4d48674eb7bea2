"""Settings of every method that leave pairs out of the tests' small models, which each method's test file declares."""

import ast
from pathlib import Path

NAME = "IN_MODELS"


def in_models():
    """Settings by method: `IN_MODELS` of tests/methods/test_METHOD.py or of a file in tests/methods/METHOD."""
    folder, settings = Path(__file__).parent / "methods", {}
    for path in sorted(folder.rglob("test_*.py")):
        method = path.stem.removeprefix("test_") if path.parent == folder else path.parent.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [NAME]:
                settings[method] = ast.literal_eval(node.value)
    return settings
