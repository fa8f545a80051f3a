"""Objects from ``{target: dotted.path, params: {…}}`` nodes, and checks of numbers in them."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from sgm.errors import UserError, nearest_name

if TYPE_CHECKING:
    from torch import nn

_DIFFUSION_TRANSFORMER = "sgm.models.transformer.DiffusionTransformer"
_TRANSFORMER_PARTS = "sgm.modules.transformer"
_AUTOENCODER = "sgm.models.autoencoder.VideoAutoencoderInferenceWrapper"
_REGULARIZER = "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"

# Paths that published YAML files use for what lives elsewhere in this code base.
TARGET_ALIASES = {
    "dit_video_concat.DiffusionTransformer": _DIFFUSION_TRANSFORMER,
    "dit_video_concat.Basic3DPositionEmbeddingMixin": (
        f"{_TRANSFORMER_PARTS}.position_embedding.Basic3DPositionEmbeddingMixin"
    ),
    "dit_video_concat.ImagePatchEmbeddingMixin": (
        f"{_TRANSFORMER_PARTS}.patch_embedding.ImagePatchEmbeddingMixin"
    ),
    "dit_video_concat.AdaLNMixin": f"{_TRANSFORMER_PARTS}.adaln.AdaLNMixin",
    "dit_video_concat.FinalLayerMixin": f"{_TRANSFORMER_PARTS}.final_layer.FinalLayerMixin",
    "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper": _AUTOENCODER,
    "vae_modules.regularizers.DiagonalGaussianRegularizer": _REGULARIZER,
    "vae_modules.cp_enc_dec.ContextParallelEncoder3D": (
        "sgm.modules.autoencoding.encoder.ContextParallelEncoder3D"
    ),
    "vae_modules.cp_enc_dec.ContextParallelDecoder3D": (
        "sgm.modules.autoencoding.decoder.ContextParallelDecoder3D"
    ),
}


# Parameters of constructors that the code gives, not a file; no message names them.
SET_BY_CODE = frozenset(
    "cached_input data_dir device dtype load lora stream_text streamed text_device tile_decode "
    "with_embedders".split()
)


def is_number(value: object) -> bool:
    """Whether a value is a real number; true is none here, although an int in Python."""
    return isinstance(value, Real) and not isinstance(value, bool)


# Annotations, as text, of what is checked before a class is built.
_PLAIN_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: value in (0, 1), "true or false"),
    "int": (lambda value: is_number(value) and value % 1 == 0, "a whole number"),
    "float": (is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
}

# A YAML file from elsewhere names classes to be called, so it may name only what is meant for it.
# `allow_targets` (the flag --allow-target) is the one way to extend this list.
_allowed_prefixes = ["sgm", "sat", "data_video", "torch.nn", "torch.optim"]


def allow_targets(prefixes: list[str]) -> None:
    """Let configurations of this process name classes under these dotted prefixes as well."""
    _allowed_prefixes.extend(prefixes)


def _is_allowed(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in _allowed_prefixes)


def get_class(target: str) -> type:
    """The class that `target` names, old names included.

    Raises:
        UserError: the target is not allowed, does not exist or is not a class.
    """
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"target {target!r} is not the dotted path of a class, module.Class")
    path = TARGET_ALIASES.get(target, target)
    if not _is_allowed(path):
        raise UserError(
            f"target {target!r} is outside {', '.join(_allowed_prefixes)}, so it is not called; "
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
    # A function, or a class that the module merely imported (subprocess.Popen …), is no target.
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
    """The part of `params` that the constructor of `cls` takes.

    Names in ``cls.IGNORED_PARAMS`` are dropped: older files carry them and nothing here needs them.

    Raises:
        UserError: a name is unknown, a required one is absent, or a value is none of its type.
    """
    ignored = getattr(cls, "IGNORED_PARAMS", frozenset())
    used = {name: value for name, value in params.items() if name not in ignored}
    signature = list(inspect.signature(cls).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        return used
    named = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = {parameter.name: parameter for parameter in named}
    for name, value in used.items():
        if name not in known:
            hint = nearest_name(name, (known.keys() | ignored) - SET_BY_CODE)
            raise UserError(f"{where}: unknown key {name!r} in params; {hint}")
        _check_type(known[name], value, where=where)
    required = [p.name for p in named if p.default is p.empty]
    absent = [name for name in required if name not in used]
    if absent:
        raise UserError(f"{where}: params lacks {', '.join(absent)}; add it to the configuration")
    return used


def _check_type(parameter: inspect.Parameter, value: Any, *, where: str) -> None:
    """Refuse a value of another type than a plain annotation says; others say it themselves.

    Raises:
        UserError: it is of another type, such as a number in quotes.
    """
    if parameter.annotation not in _PLAIN_TYPES:
        return
    is_one, name = _PLAIN_TYPES[parameter.annotation]
    if not is_one(value):
        raise UserError(f"{where}: {parameter.name}: {value!r} must be {name}")


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object that a ``{target: …, params: {…}}`` node describes.

    Args:
        config: the node, a plain mapping or an OmegaConf one. Nested nodes are handed on as they
            are: the class that receives them builds them.
        extra: further constructor arguments from the caller; they win over `params`.

    Raises:
        UserError: see `get_class` and `check_params`; also for a node of another form, and for
            values that the constructor cannot work with.
    """
    from omegaconf import (  # a decoding process, which never comes here, is spared it
        DictConfig,
        OmegaConf,
    )

    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"a node with the key 'target' was expected, not {config!r}")
    for name in config:
        if name not in ("target", "params"):
            hint = nearest_name(name, ("target", "params"))
            raise UserError(f"{config['target']}: unknown key {name!r} beside target; {hint}")
    cls = get_class(config["target"])
    params = config.get("params") or {}
    if not isinstance(params, Mapping):
        raise UserError(f"{config['target']}: params must hold keys, not {params!r}")
    used = check_params(cls, {**params, **extra}, where=config["target"])
    try:
        return cls(**used)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{config['target']} cannot be built: {reason}; check the types of its params"
        ) from error


def instantiate_part(
    config: Mapping[str, Any], where: str, *, needs: Sequence[str], **extra: Any
) -> Any:
    """As `instantiate_from_config`, for a part of the model of which something is asked.

    Args:
        config: the node.
        where: its key, for messages.
        needs: names that the object must have.
        extra: further constructor arguments.

    Raises:
        UserError: as in `instantiate_from_config`; or the class is of another kind of part.
    """
    part = instantiate_from_config(config, **extra)
    lacking = [name for name in needs if not hasattr(part, name)]
    if lacking:
        raise UserError(
            f"model.{where}: {config['target']} has no {', '.join(lacking)}, so it cannot be that "
            "part; check the target"
        )
    return part


def build_on_meta(node: Mapping[str, Any]) -> nn.Module:
    """The transformer or autoencoder of a node of the configuration, without values.

    Raises:
        UserError: the node is wrong.
    """
    import torch

    if not isinstance(node, Mapping) or not isinstance(node.get("params"), Mapping):
        raise UserError(
            "the configuration lacks network_config or first_stage_config with params, which say "
            "what the weights cannot; name a whole configuration with --base"
        )
    params = {key: value for key, value in node["params"].items() if key != "ckpt_path"}
    with torch.device("meta"):
        return instantiate_from_config({**node, "params": params})


def is_finite_number(value: object) -> bool:
    """The same without infinities and NaN."""
    return is_number(value) and math.isfinite(value)


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
) -> None:
    """Refuse a configuration value that is not a finite number of [`low`, `high`].

    Args:
        name: what the user calls the value, for the message, e.g. ``DynamicCFG: exp``.
        whole: require a whole number; ``5.0`` counts as one.

    Raises:
        UserError: `value` is no number (a bool is none either), not finite or out of range.
    """
    kind = "a whole number" if whole else "a number"
    if is_finite_number(value) and low <= value <= high and (not whole or value % 1 == 0):
        return
    if math.isfinite(low) and math.isfinite(high):
        bounds = f" from {low:g} to {high:g}"
    else:
        bounds = f" of at least {low:g}" if math.isfinite(low) else ""
    raise UserError(f"{name}={value!r}: give {kind}{bounds} in the configuration")
