"""The tour of the code names files, functions and classes that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOUR = "docs/code-tour.md"

# `file.py`, `folder/`, `file.py::Class.method` and `file.py`: `function`
PLACE = re.compile(
    r"`(?P<path>[\w./-]+(?:\.(?:py|sh|yaml|md)|/))"
    r"(?:(?:::|`: `)(?P<name>[A-Za-z_][\w.]*)(?:\(\))?)?`"
)


def tour() -> str:
    return (ROOT / TOUR).read_text(encoding="utf-8")


def places(text: str) -> list[tuple[str, str]]:
    """(path, name in it or nothing) of all that a text names."""
    return [(found["path"], found["name"] or "") for found in PLACE.finditer(text)]


def files_called(path: str) -> list[Path]:
    """What has this path; for a name without its folder, the files of sgm and tools called so."""
    if (ROOT / path).exists():
        return [ROOT / path]
    alone = "/" not in path
    return [found for top in ("sgm", "tools") for found in (ROOT / top).rglob(path) if alone]


def names(source: str) -> set[str]:
    """Functions, classes and variables of a module, and those of its classes after a dot."""
    found = set()

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    look(ast.parse(source).body, "")
    return found


def test_the_tour_names_many_places() -> None:
    assert len(places(tour())) > 20


@pytest.mark.parametrize(("path", "name"), sorted(set(places(tour()))))
def test_what_the_tour_names_exists(path: str, name: str) -> None:
    found = files_called(path)
    assert found, f"the tour names {path}, which does not exist"
    if name:
        defined = set().union(*(names(file.read_text(encoding="utf-8")) for file in found))
        assert name in defined, f"the tour names {name} in {path}, which does not define it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see `a/b.py`,\n`c.py`", [("a/b.py", ""), ("c.py", "")]),
        ("`a/b.py::C.d` and `e.py::f()`", [("a/b.py", "C.d"), ("e.py", "f")]),
        ("`a/b.py`: `C.d`; `e.py`: what it is", [("a/b.py", "C.d"), ("e.py", "")]),
        ("`a/b/`, then `inference.sh`", [("a/b/", ""), ("inference.sh", "")]),
        ("`num_steps`, `args.load` and `x: 3`", []),
    ],
)
def test_places_are_found_in_text(text: str, expected: list[tuple[str, str]]) -> None:
    assert places(text) == expected


def test_names_of_a_module() -> None:
    source = "A = 1\nB: int = 2\ndef f():\n  def h(): 0\nclass D:\n  x = 1\n  async def g(self): 0"
    assert names(source) == {"A", "B", "f", "D", "D.x", "D.g"}
