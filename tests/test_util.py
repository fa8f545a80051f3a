"""From a node of a configuration to an object: which names are obeyed, which are refused."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from sgm import util
from sgm.errors import UserError
from sgm.util import (
    TARGET_ALIASES,
    allow_targets,
    check_params,
    get_class,
    instantiate_from_config,
    instantiate_part,
)


class Part:
    """Takes one parameter, and one that it has a default for."""

    IGNORED_PARAMS = frozenset({"old_key"})

    def __init__(self, width, *, depth=1):
        self.width, self.depth = width, depth


@pytest.fixture
def allow(monkeypatch):
    """`allow_targets`, taken back afterwards."""
    monkeypatch.setattr(util, "_allowed_prefixes", list(util._allowed_prefixes))
    return allow_targets


@pytest.mark.parametrize("old", TARGET_ALIASES)
def test_an_old_name_means_the_class_at_its_new_place(old):
    cls = get_class(old)
    assert cls.__name__ == old.rpartition(".")[2]
    assert cls is get_class(TARGET_ALIASES[old])
    assert f"{cls.__module__}.{cls.__name__}" == TARGET_ALIASES[old]


def test_a_class_under_an_allowed_name_is_found():
    assert get_class("torch.nn.Identity") is nn.Identity


def test_a_foreign_target_is_refused_before_its_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("class Part: pass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="--allow-target stranger"):
        get_class("stranger.Part")
    assert "stranger" not in sys.modules


@pytest.mark.parametrize("target", ["os.system", "sgmx.Part", "sgm_evil.util.Part", "torch.load"])
def test_a_name_that_only_looks_allowed_is_refused(target):
    with pytest.raises(UserError, match="--allow-target"):
        get_class(target)


NOT_CLASSES = [
    "sgm.util.importlib",  # a module
    "sgm.util.get_class",  # a function
    "sgm.util.TARGET_ALIASES",  # a value
    "sgm.util.OmegaConf",  # a class from elsewhere that the module imported
    "sgm.util.DictConfig",
    "sgm.checkpoint.reading.Path",
    "sgm.video.Image",
    "data_video.Path",
    "sgm.util.Absent",
]


@pytest.mark.parametrize("target", NOT_CLASSES)
def test_only_a_class_of_an_allowed_package_is_a_target(target):
    with pytest.raises(UserError, match=f"has no class {target.rpartition('.')[2]!r}"):
        get_class(target)


@pytest.mark.parametrize("target", ["sgm.utill.Part", "sgm.util.get_class.Part"])
def test_a_module_that_is_not_there_is_named(target):
    with pytest.raises(UserError, match=f"target {target!r}"):
        get_class(target)


@pytest.mark.parametrize("target", ["sgm", None, 5, ["sgm.util"]])
def test_what_is_no_dotted_path_is_refused(target):
    with pytest.raises(UserError, match="is not a dotted class path"):
        get_class(target)


def test_a_mistyped_class_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'DiffusionTransformer'"):
        get_class("sgm.models.transformer.DiffusionTransformr")


def test_an_unknown_parameter_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"unknown key 'widht' in part; .*'width'"):
        check_params(Part, {"widht": 1}, where="part")


def test_an_absent_parameter_is_named():
    with pytest.raises(UserError, match="part: width is missing"):
        check_params(Part, {"depth": 1}, where="part")


class Typed:
    """Takes values of plain types."""

    def __init__(
        self,
        *,
        on: bool = True,
        count: int = 1,
        share: float = 0.5,
        name: str = "",
        other: int | None = None,
    ) -> None:
        self.values = on, count, share, name, other


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"on": "no"}, "part: on: 'no' must be true or false"),
        ({"on": 2}, "true or false"),
        ({"on": [1]}, "true or false"),
        ({"count": "2"}, "part: count: '2' must be a whole number"),
        ({"count": True}, "a whole number"),
        ({"count": 2.5}, "a whole number"),
        ({"share": "0.1"}, "share: '0.1' must be a finite number"),
        ({"name": 3}, "name: 3 must be a string"),
        ({"count": None}, "count: None must be"),
    ],
)
def test_a_value_of_another_type_is_named(params, told):
    with pytest.raises(UserError, match=told):
        check_params(Typed, params, where="part")


def test_values_of_their_types_pass_and_what_is_not_plain_is_left_to_the_class():
    assert check_params(Typed, {"on": 1, "count": 3.0}, where="part") == {"on": 1, "count": 3.0}
    params = {"on": False, "count": 3, "share": 1, "name": "a", "other": "x"}
    assert check_params(Typed, params, where="part") == params


def test_parameters_of_older_files_are_dropped():
    assert check_params(Part, {"width": 1, "old_key": 2}, where="part") == {"width": 1}


class TakesAll:
    """Accepts whatever it is given."""

    def __init__(self, **params):
        self.params = params


def test_a_class_that_takes_any_name_gets_all():
    assert check_params(TakesAll, {"anything": 1}, where="any") == {"anything": 1}


def test_an_allowed_prefix_lets_its_classes_be_built(tmp_path, monkeypatch, allow):
    (tmp_path / "friend.py").write_text("class Part:\n    def __init__(self, a, b): self.a = a, b")
    monkeypatch.syspath_prepend(tmp_path)
    allow(["friend"])
    try:
        built = instantiate_from_config({"target": "friend.Part", "params": {"a": 1, "b": 1}}, b=2)
    finally:
        sys.modules.pop("friend", None)
    assert built.a == (1, 2)  # the caller's word counts
    with pytest.raises(UserError, match="friendly"):
        get_class("friendly.Part")  # a prefix ends at a dot


MISTAKES = {
    "no mapping": (None, "key 'target' was expected"),
    "no target": ({"params": {}}, "key 'target' was expected"),
    "params is a value": ({"target": "torch.nn.Identity", "params": 5}, "params must contain keys"),
    "mistyped": ({"target": "torch.nn.Identity", "parms": {}}, "unknown key 'parms' .*'params'"),
}


def test_a_class_that_is_another_kind_of_part_is_named():
    node = {"target": "torch.nn.Identity", "params": {"num_steps": 3}}
    with pytest.raises(UserError, match="^model.sampler_config: torch.nn.Id.* has no num_steps,"):
        instantiate_part(node, "sampler_config", needs=["__call__", "num_steps"])
    assert instantiate_part(node, "sampler_config", needs=["__call__"])


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_node_of_another_form_is_refused(kind):
    node, words = MISTAKES[kind]
    with pytest.raises(UserError, match=words):
        instantiate_from_config(node)


def test_a_number_as_a_key_is_refused_like_any_unknown_one():
    with pytest.raises(UserError, match="unknown key '5'"):
        check_params(Part, {5: 1, "width": 1}, where="part")
    with pytest.raises(UserError, match="unknown key '7' in the node of torch.nn.Identity"):
        instantiate_from_config({"target": "torch.nn.Identity", 7: 1})


@pytest.mark.parametrize(
    "params",
    [
        {"in_features": "wide", "out_features": 2},  # TypeError
        {"in_channels": 4, "out_channels": 4, "kernel_size": 1, "groups": 3},  # ValueError
    ],
)
def test_values_that_a_constructor_cannot_use_are_one_sentence(params):
    target = "torch.nn.Linear" if "in_features" in params else "torch.nn.Conv1d"
    with pytest.raises(UserError, match=f"{target} cannot be built: .*types of its params") as e:
        instantiate_from_config({"target": target, "params": params})
    assert "\n" not in str(e.value) and e.value.__cause__ is not None
