from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import check_requirements
from tools.check_requirements import Requirement, read_requirements, unmet_requirements

REPOSITORY = Path(check_requirements.__file__).parents[1]


@pytest.mark.parametrize(
    ("accepts", "version", "is_met"),
    [
        (">=2.11,<3", "2.11.0+cu130", True),
        (">=2.11,<3", "2.13.0", True),
        (">=2.11,<3", "2.9.1", False),  # numbers, not letters: 9 < 11
        (">=2.11,<3", "3.0", False),
        (">=2.11,<3", "2.11.0a0+5228986", True),  # NVIDIA's containers name their builds so
        ("==0.4.12", "0.4.12", True),
        ("==0.4.12", "0.4.13", False),
        ("==2.0", "2", True),
        (">=1", "", False),
    ],
)
def test_versions_in_and_out_of_a_range(accepts, version, is_met):
    assert Requirement("name", "1", accepts).is_met_by(version) is is_met


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder on the path that claims two installed packages."""
    for name in ("demo_one-1.5+cpu", "Demo.Two-2.0"):
        folder = tmp_path / "site" / f"{name}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.split('-')[0]}\nVersion: {name.split('-')[1]}\n"
        )
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_what_is_unmet_is_named_with_the_reason(installed, tmp_path):
    (tmp_path / "base.txt").write_text("demo-one==1.9  # >=1.4,<2: in its range\n")
    (tmp_path / "dev.txt").write_text(
        "# a comment\n-r base.txt\n\n"
        "demo-two==2.1  # without a range only this version will do\n"
        "demo-three==1.0  # >=1: not there\n"
    )
    assert unmet_requirements(tmp_path / "base.txt") == []
    assert unmet_requirements(tmp_path / "dev.txt") == [
        "demo-two (2.0, needs ==2.1)",
        "demo-three (absent)",
    ]


@pytest.mark.parametrize(("python", "pin"), [((3, 9), "1"), ((3, 10), "1"), ((3, 11), "2")])
def test_a_marker_chooses_by_the_version_of_python(tmp_path, monkeypatch, python, pin):
    file = tmp_path / "requirements.txt"
    file.write_text(
        'a==1; python_version < "3.11"  # >=1: old\na==2; python_version >= "3.11"  # >=1: new\n'
    )
    monkeypatch.setattr(check_requirements, "sys", SimpleNamespace(version_info=python))
    assert [one.pin for one in read_requirements(file)] == [pin]


@pytest.mark.parametrize(
    "line", ["torch", "torch>=2  # why", "torch==2", 'a==1; os_name == "x"  # b']
)
def test_a_line_of_another_form_is_refused(tmp_path, line):
    file = tmp_path / "requirements.txt"
    file.write_text(f"# first\n{line}\n")
    with pytest.raises(ValueError, match=r"requirements\.txt:2"):
        read_requirements(file)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_the_shipped_pins_lie_in_their_own_ranges(name):
    requirements = read_requirements(REPOSITORY / name)
    assert len(requirements) > 10
    assert [one for one in requirements if not one.is_met_by(one.pin)] == []
    assert len({one.name for one in requirements}) == len(requirements)


# Packages, in small letters, whose modules have another name.
PACKAGES = {"PIL": "pillow", "sat": "swissarmytransformer", "yaml": "pyyaml"}
# Needed by what we import, not imported by us: the file itself says by what.
INDIRECT = {"setuptools"}


def imported_names() -> set[str]:
    """Top-level names that the product's own files import from outside it."""
    tops = [path for path in REPOSITORY.iterdir() if path.name[0] != "." and path.name != "tests"]
    files = [file for top in tops for file in (top.rglob("*.py") if top.is_dir() else [top])]
    names: set[str] = set()
    for file in (file for file in files if file.suffix == ".py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - {path.stem for path in tops} - set(sys.stdlib_module_names)


def test_requirements_name_every_package_that_is_imported_and_no_other():
    required = {one.name.lower() for one in read_requirements(REPOSITORY / "requirements.txt")}
    imported = {PACKAGES.get(name, name.replace("_", "-").lower()) for name in imported_names()}
    # Optional: the prompt tool and the benchmark say how to install what they need, and
    # attention does without FlashAttention-4.
    assert imported - required == {"openai", "diffusers", "peft", "flash-attn"}
    assert required - imported == INDIRECT
