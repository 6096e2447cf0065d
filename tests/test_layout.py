"""The layout holds: imports point one way, and the packaging lists what the folders have."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LAYERS = ["configs", "data", "distill", "decode", "train"]  # each may import itself and those before it
TOP = len(LAYERS)  # src/slipstream, which may import them all
FOLDERS = {"slipstream": "src/slipstream"} | {f"slipstream.{layer}": layer for layer in LAYERS}


def modules(*folders: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def level(name: str) -> int:
    """Where a name under `slipstream` stands: slipstream.data.template is 1, slipstream.cli is TOP."""
    part = name.partition(".")[2].partition(".")[0]
    return LAYERS.index(part) if part in LAYERS else TOP


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


@pytest.mark.parametrize("layer", range(TOP + 1), ids=[*LAYERS, "slipstream"])
def test_imports_point_one_way(layer):
    folder = LAYERS[layer] if layer < TOP else "src/slipstream"
    wrong = [
        f"{path}:{line} imports {name}"
        for path in modules(folder)
        for line, name in imported_names(path)
        if name.split(".")[0] == "slipstream" and level(name) > layer
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_are_imported_by_their_full_name():
    wrong = [
        f"{path}:{line} imports {name}"
        for path in modules(*FOLDERS.values(), "tests", "benchmarks")
        for line, name in imported_names(path)
        if name.split(".")[0] in {"", *LAYERS}  # "" is a relative import
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_are_the_folders_with_modules():
    assert settings()["package-dir"] == FOLDERS
    found = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in modules(folder)
    }
    assert sorted(settings()["packages"]) == sorted(found)
    missing = [
        folder
        for folder in {path.parent for path in modules(*FOLDERS.values())}
        if not (ROOT / folder / "__init__.py").exists()
    ]
    assert not missing, f"no __init__.py in {missing}"


def test_every_data_file_is_package_data():
    wrong = []
    for package, folder in FOLDERS.items():
        shipped = {
            path for pattern in settings()["package-data"].get(package, []) for path in (ROOT / folder).glob(pattern)
        }
        wrong += [
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file()
            and path.suffix not in {".py", ".pyc"}
            and not path.name.startswith(".")
            and path not in shipped
        ]
    assert not wrong, f"not in [tool.setuptools.package-data]: {wrong}"
