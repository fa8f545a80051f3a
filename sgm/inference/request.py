"""Whether a configuration can be sampled at all, found out before any weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sgm.errors import UserError, mistyped_as

SPATIAL_FACTOR = 8  # of the autoencoder, in height and width
TEMPORAL_FACTOR = 4  # in time, where the configuration names none
_T5_LENGTH = 226  # of texts, where the node of FrozenT5Embedder does not say
_SIZES = ("num_frames", "latent_height", "latent_width", "in_channels")
_WIDTHS = ("hidden_size", "num_attention_heads")


def check_model_section(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The network's params of a `model` section.

    Raises:
        UserError: the section or the node is absent, a size in it is no positive whole number, or
            texts have another length than the network was made for.
    """
    if not model:
        raise UserError(
            "the configuration has no section 'model'; name a file that has it before this one"
        )
    node = model.get("network_config")
    params = node.get("params") if isinstance(node, Mapping) else None
    if not params or not isinstance(params, Mapping):
        hint = mistyped_as("network_config", model) or mistyped_as("params", node)
        raise UserError(
            f"model.network_config.params is absent{hint} or holds no keys; name a configuration "
            "that has it, before this one if this goes on top of it"
        )
    for key in (*_SIZES, *_WIDTHS, "time_compressed_rate"):
        if key in params:
            value = params[key]
            # bool is an int in Python, but true is no size.
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"model.network_config.params.{key} is {value!r}; it must be a whole number "
                    "of at least 1"
                )
    _check_text_length(model, params)
    return params


def _check_text_length(model: Mapping[str, Any], network: Mapping[str, Any]) -> None:
    """Compare the length of texts as their encoder's node and the network's params give it."""
    try:
        (embedder,) = model["conditioner_config"]["params"]["emb_models"]
        given = embedder["params"].get("max_length", _T5_LENGTH)
        wanted = network["modules"]["pos_embed_config"]["params"]["text_length"]
    except (KeyError, TypeError, ValueError, AttributeError):  # their form is told of elsewhere
        return
    if given != wanted:
        raise UserError(
            f"model.conditioner_config.params.emb_models[0].params.max_length: {given!r} must be "
            f"{wanted!r}, text_length in model.network_config.params.modules.pos_embed_config"
        )


def require_sizes(params: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Check that sizes are there; what they may be, `check_model_section` has seen to.

    Raises:
        UserError: the first one that is absent.
    """
    for key in keys:
        if key not in params:
            raise UserError(
                f"model.network_config.params lacks {key}{mistyped_as(key, params)}; add it, a "
                "whole number"
            )


def head_size(model: Mapping[str, Any]) -> int:
    """Width of an attention head of the network in a `model` section.

    Raises:
        UserError: as in `check_model_section`; or a size that decides it is absent.
    """
    params = check_model_section(model)
    require_sizes(params, _WIDTHS)
    return params["hidden_size"] // params["num_attention_heads"]


def check_attention(choice: str, model: Mapping[str, Any], **where: Any) -> None:
    """Find out whether the kernel of attention that `args` ask for runs; one for "auto" does.

    Args:
        choice: "auto", or the name of a kernel.
        model: the `model` section.
        where: `device` and `dtype` of the network.

    Raises:
        UserError: it does not; says what it needs. Or as in `head_size`.
    """
    width = head_size(model)
    if choice != "auto":
        from sgm.modules.transformer.attention import check_kernel  # imports PyTorch

        check_kernel(choice, head_size=width, **where)


def video_size(params: Mapping[str, Any]) -> list[int]:
    """Height and width in pixels of the videos that the network's position table is made for."""
    return [params[key] * SPATIAL_FACTOR for key in ("latent_height", "latent_width")]


def _temporal_factor(params: Mapping[str, Any]) -> int:
    return params.get("time_compressed_rate", TEMPORAL_FACTOR)


def allowed_num_frames(params: Mapping[str, Any]) -> list[int]:
    """Numbers of latent frames that can be sampled: odd, up to the position table's.

    The decoder takes three latent frames, then two at a time (or a single one), hence odd.
    """
    return list(range(1, (params["num_frames"] - 1) // _temporal_factor(params) + 2, 2))


def latent_shape(args: Any, model: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Shape (t, c, h, w) of a sample's latents.

    Raises:
        UserError: a size that the model was not made for; says which ones it was.
    """
    params = check_model_section(model)
    require_sizes(params, _SIZES)
    allowed = allowed_num_frames(params)
    if args.sampling_num_frames not in allowed:
        factor = _temporal_factor(params)
        frames = ", ".join(f"{n} ({factor * (n - 1) + 1})" for n in allowed)
        raise UserError(
            f"sampling_num_frames={args.sampling_num_frames} counts latent frames; this model "
            f"allows (video frames in brackets): {frames}"
        )
    size = video_size(params)
    if list(args.sampling_image_size) != size:
        raise UserError(
            f"sampling_image_size={list(args.sampling_image_size)}: this model makes videos of "
            f"{size} (height, width) only, since its position table is of that size"
        )
    if args.latent_channels != params["in_channels"]:
        raise UserError(
            f"latent_channels={args.latent_channels}, but the model has in_channels="
            f"{params['in_channels']}; set latent_channels to that"
        )
    if args.batch_size < 1 or args.sampling_fps < 1:
        raise UserError("batch_size and sampling_fps must be at least 1")
    if not 0 <= args.step_cache < math.inf:
        raise UserError(f"step_cache={args.step_cache}: it must be 0 (off) or a number above 0")
    if args.step_cache and args.parallel == "video":
        raise UserError("step_cache does not go with parallel: video; leave one of them out")
    return (
        args.sampling_num_frames,
        params["in_channels"],
        params["latent_height"],
        params["latent_width"],
    )
