"""Build objects from YAML nodes ``{target: dotted.path, params: {…}}``, and check their params."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeGuard

from sgm.errors import UserError, check_known, nearest_name

if TYPE_CHECKING:
    from torch import nn

# Module path in published YAML files → classes of this code base that replace those of the module.
_OLD_MODULES = {
    "dit_video_concat": (
        "sgm.models.transformer.DiffusionTransformer",
        "sgm.modules.transformer.position_embedding.Basic3DPositionEmbeddingMixin",
        "sgm.modules.transformer.patch_embedding.ImagePatchEmbeddingMixin",
        "sgm.modules.transformer.adaln.AdaLNMixin",
        "sgm.modules.transformer.final_layer.FinalLayerMixin",
    ),
    "vae_modules.autoencoder": ("sgm.models.autoencoder.VideoAutoencoderInferenceWrapper",),
    "vae_modules.regularizers": (
        "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer",
    ),
    "vae_modules.cp_enc_dec": (
        "sgm.modules.autoencoding.encoder.ContextParallelEncoder3D",
        "sgm.modules.autoencoding.decoder.ContextParallelDecoder3D",
    ),
}
# Class path in published YAML files → class path in this code base.
TARGET_ALIASES = {
    f"{module}.{path.rpartition('.')[2]}": path
    for module, paths in _OLD_MODULES.items()
    for path in paths
}

# Constructor parameters that code sets, not YAML files. Messages do not suggest them.
SET_BY_CODE = frozenset(
    "cached_input data_dir device dtype load lora stream_text streamed text_device tile_decode "
    "with_embedders".split()
)


def is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a real number and finite.

    A bool does not count as a number, although it is an int in Python.
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# Annotation, as a string → function that checks a value, and what the value must be.
_PLAIN_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: value in (0, 1), "true or false"),
    "int": (lambda value: is_finite_number(value) and value % 1 == 0, "a whole number"),
    "float": (is_finite_number, "a finite number"),
    "str": (lambda value: isinstance(value, str), "a string"),
}

# Classes named in YAML files are called, so only classes from these packages are allowed.
# `allow_targets` (the flag --allow-target) extends the list.
_allowed_prefixes = ["sgm", "sat", "data_video", "torch.nn", "torch.optim"]


def allow_targets(prefixes: list[str]) -> None:
    """Allow more dotted prefixes for the classes that configurations name, in this process."""
    _allowed_prefixes.extend(prefixes)


def _is_allowed(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in _allowed_prefixes)


def get_class(target: str) -> type:
    """Return the class with the dotted path `target`, which may be an old name.

    Raises:
        UserError: the target is not allowed, does not exist or is not a class.
    """
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"target {target!r} is not a dotted class path such as module.Class")
    path = TARGET_ALIASES.get(target, target)
    if not _is_allowed(path):
        raise UserError(
            f"target {target!r} is not built, since it is outside {', '.join(_allowed_prefixes)}; "
            f"if you trust this configuration, add --allow-target {path.split('.')[0]}"
        )
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"target {target!r}: there is no module {error.name!r}; "
            f"check the spelling of the target in the configuration"
        ) from None
    found = getattr(module, class_name, None)
    # Reject functions, and classes that the module only imports (such as subprocess.Popen).
    if not (inspect.isclass(found) and _is_allowed(found.__module__)):
        classes = [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module_name and name[0] != "_"
        ]
        raise UserError(
            f"target {target!r}: {module_name} has no class {class_name!r}; "
            f"{nearest_name(class_name, classes)}"
        )
    return found


def check_params(cls: type, params: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check `params` against the constructor of `cls`, and return those that it accepts.

    Names in ``cls.IGNORED_PARAMS``, which occur in older files, are dropped and have no effect.

    Raises:
        UserError: a name is unknown, a required name is missing, or a value has the wrong type.
    """
    ignored: frozenset[str] = getattr(cls, "IGNORED_PARAMS", frozenset())
    used = {name: value for name, value in params.items() if name not in ignored}
    signature = list(inspect.signature(cls).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        return used
    known = {p.name: p for p in signature if p.kind is not p.VAR_POSITIONAL}
    allowed = [*known.keys() - SET_BY_CODE, *ignored]
    check_known([name for name in used if name not in known], allowed, where=where)
    for name, value in used.items():
        # The constructor itself checks values with other annotations.
        has_type, expected = _PLAIN_TYPES.get(known[name].annotation, (None, ""))
        if has_type is not None and not has_type(value):
            raise UserError(f"{where}: {name}: {value!r} must be {expected}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in used:
            raise UserError(f"{where}: {name} is missing; add it")
    return used


def instantiate_from_config(config: Mapping[str, Any], **extra: object) -> Any:  # noqa: ANN401 (the configuration chooses the class)
    """Build the object that a node ``{target: …, params: {…}}`` describes.

    Args:
        config: the node. Nested nodes are passed to the constructor, which builds them.
        extra: more constructor arguments from the caller; they override `params`.

    Raises:
        UserError: the node is malformed, `get_class` or `check_params` raises it, or the
            constructor cannot use a value.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"a node with the key 'target' was expected, not {config!r}")
    target, params = config["target"], config.get("params") or {}
    check_known(config, ("target", "params"), where=f"the node of {target}")
    cls = get_class(target)
    if not isinstance(params, Mapping):
        raise UserError(f"{target}: params must contain keys, not {params!r}")
    used = check_params(cls, {**params, **extra}, where=f"params of {target}")
    try:
        return cls(**used)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{target} cannot be built: {reason}; check the types of its params"
        ) from error


def instantiate_part(
    config: Mapping[str, Any], where: str, *, needs: Sequence[str], **extra: object
) -> Any:  # noqa: ANN401 (as above)
    """Build a part of the model with `instantiate_from_config`, and check its attributes.

    Args:
        config: the node.
        where: the key of the node, for messages.
        needs: names of the attributes that the object must have.
        extra: more constructor arguments.

    Raises:
        UserError: `instantiate_from_config` raises it, or the object lacks an attribute.
    """
    part = instantiate_from_config(config, **extra)
    lacking = [name for name in needs if not hasattr(part, name)]
    if lacking:
        raise UserError(
            f"model.{where}: {config['target']} has no {', '.join(lacking)}, so it cannot be used "
            "here; check the target"
        )
    return part


def build_on_meta(node: Mapping[str, Any]) -> nn.Module:
    """Build the transformer or autoencoder of `node` on the device "meta", without weight values.

    Raises:
        UserError: the node cannot be built.
    """
    import torch

    if not isinstance(node, Mapping) or not isinstance(node.get("params"), Mapping):
        raise UserError(
            "network_config or first_stage_config, or its params, is missing in the configuration; "
            "give --base a complete configuration"
        )
    params = {key: value for key, value in node["params"].items() if key != "ckpt_path"}
    with torch.device("meta"):
        return instantiate_from_config({**node, "params": params})


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
) -> None:
    """Check that a value is a finite number in [`low`, `high`].

    Args:
        name: the user's name of the value, for the message, e.g. ``DynamicCFG: exp``.
        value: the value to check.
        low, high: the allowed range; infinite by default.
        whole: require a whole number; ``5.0`` counts as a whole number.

    Raises:
        UserError: `value` is not a number (a bool does not count as one), not finite or out of
            range.
    """
    kind = "a whole number" if whole else "a finite number"
    if is_finite_number(value) and low <= value <= high and (not whole or value % 1 == 0):
        return
    bounds = f" from {low:g} to {high:g}"
    if math.isinf(high):
        bounds = "" if math.isinf(low) else f" of at least {low:g}"
    raise UserError(f"{name}={value!r} must be {kind}{bounds}")
