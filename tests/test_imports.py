"""The direction of imports: each room of the code imports from its own floor or from below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. Rooms of one floor may import each other as long as that makes no circle.
FLOORS = [
    ["ground"], ["modules"], ["models"], ["checkpoint"], ["engine", "parallel"],
    ["pipeline"], ["data", "training"], ["commands"], ["tools"],
]  # fmt: skip
# What is not in the room that its folder names. Of the files of checkpoint, those that constructors
# call for their ckpt_path and model_dir are on the ground.
ROOMS = {
    **dict.fromkeys(
        [
            *("sgm", "sgm.cli", "sgm.config", "sgm.distributed", "sgm.errors", "sgm.files"),
            *("sgm.offload", "sgm.options", "sgm.preflight", "sgm.progress", "sgm.prompts"),
            *("sgm.sat_runtime", "sgm.seeds", "sgm.toolchain", "sgm.util", "sgm.video"),
            *("sgm.checkpoint", "sgm.checkpoint.diffusers_folder", "sgm.checkpoint.find"),
            *("sgm.checkpoint.reading", "sgm.checkpoint.strict_loading", "sgm.checkpoint.table"),
            *("sgm.checkpoint.tensors", "sgm.checkpoint.text_encoder", "sgm.checkpoint.vae"),
            "sgm.checkpoint.weight_file",
        ],
        "ground",
    ),
    "sgm.loading": "pipeline",
}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# `sgm` imports what it offers only when that is asked for.
LAZY = "sgm/__init__.py"


def files(root: Path = ROOT) -> dict[str, Path]:
    """The Python files outside tests, by the name of their module."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        outside = place.parts[0] == "tests" or any(part.startswith(".") for part in place.parts)
        if outside or (root / place.parts[0] / "pyvenv.cfg").is_file():
            continue
        parts = place.with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def room(module: str) -> str:
    """The room of a module of this project."""
    top, *inner = module.split(".")
    if module in ROOMS:
        return ROOMS[module]
    if top == "tools":
        return "tools"
    if top == "sgm" and inner[0] in FLOOR_OF and inner[0] not in ("commands", "tools"):
        return inner[0]
    if not inner and top != "sgm":
        return "commands"
    place = FILES[module].relative_to(ROOT) if module in FILES else module
    pytest.fail(
        f"{place} is in no room: put it into a folder that is one, or into ROOMS of {__file__}"
    )


def imports(source: str, module: str, is_package: bool, modules: set[str]) -> Iterator[str]:
    """Modules of this project that the code imports anywhere, in functions and for types too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name in modules:
                    yield name.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                if f"{base}.{name.name}" in modules:
                    yield f"{base}.{name.name}"
                elif base == "sgm":  # one of the names that it imports on demand
                    yield "sgm.pipeline"
                elif base in modules:
                    yield base


def imports_of(module: str) -> set[str]:
    path = FILES[module]
    is_package = path.name == "__init__.py"
    return set(imports(path.read_text(encoding="utf-8"), module, is_package, set(FILES)))


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    place = FILES[module].relative_to(ROOT).as_posix()
    own = room(module)
    if place == LAZY:
        return
    upward = [
        f"{place} ({own}) imports {imported} ({room(imported)})"
        for imported in imports_of(module)
        if FLOOR_OF[room(imported)] > FLOOR_OF[own]
    ]
    assert not upward, f"{'; '.join(upward)}: imports point down only"


def test_rooms_form_no_circle() -> None:
    below: dict[str, set[str]] = {name: set() for name in FLOOR_OF}
    for module in FILES:
        place = FILES[module].relative_to(ROOT).as_posix()
        if place != LAZY:
            below[room(module)] |= {room(name) for name in imports_of(module)} - {room(module)}
    try:
        TopologicalSorter(below).prepare()
    except CycleError as circle:
        pytest.fail(f"rooms import each other in a circle: {' → '.join(circle.args[1])}")


def test_the_package_of_checkpoint_imports_nothing() -> None:
    """Else whoever reads one of its files on the ground would import the rest."""
    assert imports_of("sgm.checkpoint") == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sgm.engine", {"sgm.engine"}),
        ("import torch, sgm.util as u", {"sgm.util"}),
        ("from sgm.engine import Any", {"sgm.engine"}),
        ("from sgm.checkpoint import lora", {"sgm.checkpoint.lora"}),
        ("from sgm import CogVideoX", {"sgm.pipeline"}),
        ("from sgm import engine, util", {"sgm.engine", "sgm.util"}),
        ("from .lora import x", {"sgm.checkpoint.lora"}),
        ("from .. import engine", {"sgm.engine"}),
        ("def f():\n    from sgm.engine import x", {"sgm.engine"}),
        ("if TYPE_CHECKING:\n    import sgm.engine", {"sgm.engine"}),
        ("from sgm_of_others import engine\nimport torch", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str]) -> None:
    assert set(imports(source, "sgm.checkpoint.vae", False, set(FILES))) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("sgm.checkpoint.vae", "ground"),
        ("sgm.checkpoint.lora", "checkpoint"),
        ("sgm.modules.transformer.adaln", "modules"),
        ("sgm.loading", "pipeline"),
        ("train_video", "commands"),
        ("tools.bench.jobs", "tools"),
    ],
)
def test_modules_have_their_rooms(module: str, expected: str) -> None:
    assert module in FILES and room(module) == expected


@pytest.mark.parametrize("module", ["sgm.attic", "sgm.attic.trunk", "web.page", "sgm.tools"])
def test_a_file_in_an_unknown_room_is_named(module: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=f"{module} is in no room"):
        room(module)


def test_importing_sgm_imports_no_torch() -> None:
    code = "import sgm, sys; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
