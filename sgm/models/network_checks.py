"""Whether the sizes and nodes of the transformer's configuration make a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sgm.errors import UserError, nearest_name
from sgm.numbers import check_number

_USED_TRANSFORMER_ARGS = ("checkpoint_activations", "skip_init")
# What these say is the one form of the model that is built here.
_FIXED_TRANSFORMER_ARGS = {"layernorm_order": "pre", "is_decoder": False, "model_parallel_size": 1}
# Sizes of SAT's embeddings of words and 1D positions, which this model has no use for.
_UNUSED_TRANSFORMER_ARGS = ("vocab_size", "max_sequence_length")


def check_divides(name: str, divisor: int, **divided: int) -> None:
    """Check that one size, `divided`, is a multiple of another; both by their names.

    Raises:
        UserError: it is not, or one of them is below 1.
    """
    ((divided_name, size),) = divided.items()
    if divisor < 1 or size < 1 or size % divisor:
        raise UserError(f"{divided_name}={size} is not a multiple of {name}={divisor}")


def check_transformer_args(transformer_args: Mapping[str, Any]) -> None:
    """Check the settings of SAT's transformer.

    Raises:
        UserError: one is unknown, or asks for another form of the model.
    """
    known = {*_USED_TRANSFORMER_ARGS, *_FIXED_TRANSFORMER_ARGS, *_UNUSED_TRANSFORMER_ARGS}
    for name, value in transformer_args.items():
        if name not in known:
            raise UserError(
                f"unknown key {name!r} in transformer_args; {nearest_name(name, known)}"
            )
        if name in _FIXED_TRANSFORMER_ARGS and value != _FIXED_TRANSFORMER_ARGS[name]:
            raise UserError(
                f"{name}={value!r} in transformer_args: this model is built with "
                f"{_FIXED_TRANSFORMER_ARGS[name]!r} only"
            )


def check_modules(modules: Mapping[str, Any], *, parts: Iterable[str], num_layers: int) -> None:
    """Check that there is a node for each of the `parts` of the model, and LoRA's settings.

    Raises:
        UserError: a node is absent or unknown, or a setting is out of its range.
    """
    if num_layers < 1:
        raise UserError(f"num_layers={num_layers}: at least 1 is needed")
    required = [f"{name}_config" for name in parts]
    known = [*required, "lora_config"]
    for name in modules:
        if name not in known:
            raise UserError(f"unknown key {name!r} in modules; {nearest_name(name, known)}")
    for name in required:
        if not modules.get(name):
            raise UserError(f"modules lacks {name}; add it to network_config.params.modules")
    lora = (modules.get("lora_config") or {}).get("params") or {}
    if modules.get("lora_config"):
        check_number("lora_config: r", lora.get("r"), low=1, whole=True)
        check_number("lora_config: lora_alpha", lora.get("lora_alpha", 1))
        check_number("lora_config: lora_dropout", lora.get("lora_dropout", 0), low=0, high=1)
    outside = [i for i in lora.get("layer_range") or [] if not 0 <= i < num_layers]
    if outside:
        raise UserError(f"lora_config: layer_range names layer {outside[0]} of {num_layers} layers")
