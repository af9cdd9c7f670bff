"""docs/ARCHITECTURE.md and docs/ALGORITHM.md against the code: names, files, who imports whom; and
no import circle.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "priorzero"
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
ALGORITHM = (ROOT / "docs" / "ALGORITHM.md").read_text(encoding="utf-8")


def _path(name: str) -> Path:
    return PACKAGE / name if (PACKAGE / name).exists() else ROOT / name


def _names(path: Path) -> set[str]:
    """Functions and classes of a file, and `Class.member` for what its classes define."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{member.name}"
                for member in node.body
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    return found


@pytest.mark.parametrize(("page", "least"), [(PAGE, 30), (ALGORITHM, 25)])
def test_every_name_on_the_page_is_in_its_file(page, least):
    pairs = re.findall(r"`([A-Za-z_.]+)`(?: \(|, )`([\w/.]+\.py)`", page)
    assert len(pairs) > least
    missing = [(name, path) for name, path in pairs if not _path(path).exists()]
    assert missing == []
    assert [(name, path) for name, path in pairs if name not in _names(_path(path))] == []


def test_every_file_on_the_page_is_there():
    paths = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE + ALGORITHM))
    assert [path for path in paths if not _path(path).exists()] == []


def _modules() -> dict[str, Path]:
    """Dotted name -> file."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _imports(nodes: list[ast.stmt], deep: bool) -> Iterator[str]:
    """Modules that are imported, not those under `if TYPE_CHECKING`; `deep`: in functions too."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif deep or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            children = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
            handlers = [s for h in getattr(node, "handlers", []) for s in h.body]
            yield from _imports([*children, *handlers], deep)


def _uses(deep: bool) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    modules = _modules()
    return {
        name: {
            used
            for used in _imports(ast.parse(path.read_text(encoding="utf-8")).body, deep)
            if used in modules
            and used not in (name, "priorzero")
            # A name of a package's own module: `from package import module`.
            and not name.startswith(used + ".")
        }
        for name, path in modules.items()
    }


def test_rooms_import_only_what_the_page_allows():
    table = PAGE.split("## Rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \| ([^|]+) \|$", table, re.M)
    allowed = {
        room: None if "every" in may else set(re.findall(r"`(\w+)`", may))
        for rooms, may in rows
        for room in re.findall(r"`(\w+)`", rooms)
    }

    def room(module: str) -> str:
        return module.split(".")[1]

    wrong = {
        f"{name} -> {used}"
        for name, uses in _uses(deep=True).items()
        for used in uses
        if name != "priorzero" and room(used) != room(name)
        if allowed[room(name)] is not None and room(used) not in allowed[room(name)]
    }
    assert wrong == set()


def test_no_module_is_imported_in_a_circle():
    uses = _uses(deep=False)
    order = list(TopologicalSorter(uses).static_order())  # CycleError names the circle
    assert set(order) >= set(uses)


def test_no_room_imports_a_root_file():
    roots = {path.stem for path in ROOT.glob("*.py")}
    wrong = [
        (path.name, used)
        for path in _modules().values()
        for used in _imports(ast.parse(path.read_text(encoding="utf-8")).body, deep=True)
        if used.split(".")[0] in roots
    ]
    assert wrong == []
