"""The rooms of the package: imports between its files go one way."""

import ast
from pathlib import Path

import pytest

import crrelu_llm

PACKAGE = Path(crrelu_llm.__file__).parent


def modules(folder, prefix):
    """The files below a folder, by the name that they are imported by."""
    found = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        found[".".join((prefix, *(part for part in parts if part != "__init__")))] = file
    return found


def imports(name, file, known):
    """Which of the known modules a file imports, at its top, in its functions or for its annotations alone."""
    parts = name.split(".")
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = len(parts) - node.level + (file.name == "__init__.py")
            base = ".".join([*(parts[:above] if node.level else ()), *([node.module] if node.module else ())])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                # a file of the package, unless its __init__ has something of that name (the function patching.patch)
                in_init = whole not in known or alias.name in exported(known.get(base))
                found.add(base if in_init else whole)
    return (found & known.keys()) - {name}


def exported(file):
    """The names that a package's __init__ takes from its files."""
    if file is None or file.name != "__init__.py":
        return set()
    nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def circle(graph):
    """A shortest path through a graph that ends where it began, or None."""
    for start in sorted(graph):
        paths = [[start]]
        reached = set()
        while paths:
            path = paths.pop(0)
            for name in sorted(graph[path[-1]]):
                if name == start:
                    return [*path, start]
                if name not in reached:
                    reached.add(name)
                    paths.append([*path, name])
    return None


def graph_of(folder, prefix):
    """What each file below a folder imports of the others."""
    known = modules(folder, prefix)
    return {name: imports(name, file, known) for name, file in known.items()}


ROOMS = [file.parent.name for file in sorted(PACKAGE.glob("*/__init__.py"))]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    found = circle(graph_of(PACKAGE / room, f"{PACKAGE.name}.{room}"))
    assert found is None, f"files that import each other: {' → '.join(found)}"


def test_rooms_import_one_way():
    """The plugin that vLLM loads is the exception: it stands in compat, and needs the activation and the patch."""
    files = {f"{PACKAGE.name}.compat.vllm": set()}
    rooms = {room: set() for room in ROOMS}
    for name, found in (graph_of(PACKAGE, PACKAGE.name) | files).items():
        room = name.removeprefix(f"{PACKAGE.name}.").split(".")[0]
        if room in rooms:
            rooms[room] |= {other.split(".")[1] for other in found if "." in other} & rooms.keys() - {room}
    found = circle(rooms)
    assert found is None, f"rooms that import each other: {' → '.join(found)}"


def test_a_circle_is_found_wherever_the_import_stands(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "__init__.py").write_text("from room.low import low\n")
    (tmp_path / "low.py").write_text("def low():\n    from room.inner import middle\n")
    (tmp_path / "inner/__init__.py").write_text("")
    (tmp_path / "inner/middle.py").write_text("if TYPE_CHECKING:\n    from .. import high\n")
    (tmp_path / "high.py").write_text("import room.other\n")
    (tmp_path / "other.py").write_text("")
    assert circle(graph_of(tmp_path, "room")) is None
    (tmp_path / "other.py").write_text("from room import low\n")  # the function, which __init__ has
    assert circle(graph_of(tmp_path, "room"))[-2:] == ["room.other", "room"]
    (tmp_path / "other.py").write_text("from room.low import low\n")
    assert circle(graph_of(tmp_path, "room")) == [
        "room.high", "room.other", "room.low", "room.inner.middle", "room.high"
    ]  # fmt: skip
