"""Whether a configuration can work, found out before any weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgm.config import LoraChoice
from sgm.errors import UserError, mistyped_as, nearest_name
from sgm.util import TARGET_ALIASES, check_number

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


def num_latent_frames(num_frames: int, model: Mapping[str, Any]) -> int:
    """Latent frames of a video of `num_frames` frames.

    Raises:
        UserError: the model does not make videos of that length; the message lists the lengths.
    """
    params = check_model_section(model)
    require_sizes(params, _SIZES)
    factor = _temporal_factor(params)
    lengths = {factor * (n - 1) + 1: n for n in allowed_num_frames(params)}
    if type(num_frames) is not int or num_frames not in lengths:
        raise UserError(
            f"num_frames={num_frames!r} counts frames of the video; this model allows: "
            f"{', '.join(map(str, lengths))}"
        )
    return lengths[num_frames]


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


T5_EMBEDDER = "sgm.modules.encoders.modules.FrozenT5Embedder"


def check_weight_paths(
    model: Mapping[str, Any],
    load: str | None,
    *,
    lora: Sequence[LoraChoice] = (),
    random_transformer: bool = False,
) -> None:
    """Check `load`, `lora`, the autoencoder's `ckpt_path` and every T5 embedder's `model_dir`.

    A part without a file would start from random weights, and its output would be noise.

    Args:
        model: the `model` section; with ``latent_input: true`` no autoencoder is needed.
        load: `args.load`.
        lora: `args.lora`, merged into these weights; that they hold LoRAs is checked too.
        random_transformer: `load` is not needed, the transformer is trained from nothing.

    Raises:
        UserError: a path is not set, or nothing of the expected kind is there.
    """
    if not random_transformer:
        # Imports PyTorch, which a mistake on the command line need not wait for.
        from sgm.checkpoint.transformer import check_transformer

        if not load:
            raise UserError(
                "args.load is not set: it must name the folder of the transformer's weights"
            )
        check_transformer(load)
    if lora:
        from sgm.checkpoint.lora import read_lora

        for choice in lora:
            read_lora(choice.path, tell=False)  # whoever merges it tells
    if not model.get("latent_input"):
        where = "first_stage_config"
        if model.get(where) is None:
            raise UserError(f"model lacks {where}{mistyped_as(where, model)}; add it")
        path = weight_path(model[where], "ckpt_path", where=where)
        from sgm.checkpoint.vae import vae_files

        vae_files(path)
    for where, path in t5_folders(model):
        if not path.is_dir():
            raise UserError(
                f"model.{where}.params.model_dir: the T5 folder {path} does not exist (model_dir "
                f"{str(path)!r} is not a folder); README tells where to get it"
            )
        from sgm.checkpoint.text_encoder import find_t5

        find_t5(path)


def t5_folders(model: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Every T5 embedder of a `model` section: where its node stands, and its `model_dir`.

    Raises:
        UserError: that is not set.
    """
    conditioner = model.get("conditioner_config")
    params = conditioner.get("params") if isinstance(conditioner, Mapping) else None
    embedders = params.get("emb_models") if isinstance(params, Mapping) else None
    for index, node in enumerate(embedders if isinstance(embedders, list | tuple) else []):
        target = node.get("target") if isinstance(node, Mapping) else None
        if isinstance(target, str) and TARGET_ALIASES.get(target, target) == T5_EMBEDDER:
            where = f"conditioner_config.params.emb_models[{index}]"
            yield where, weight_path(node, "model_dir", where=where)


def weight_path(node: Any, key: str, *, where: str) -> Path:
    """The path under `key` of a node's params; UserError where there is none.

    Args:
        node: of the autoencoder or of a text encoder; None where the section lacks it.
        key: of its params.
        where: its place within the section `model`.
    """
    params = node.get("params") if isinstance(node, Mapping) else None
    value = params.get(key) if isinstance(params, Mapping) else None
    if not value or not isinstance(value, str):
        what = mistyped_as(key, params) or f" (it is {value!r})"
        raise UserError(
            f"model.{where}.params.{key} is not set{what}: it must be the path of the weights; "
            "without them that part of the model would be random"
        )
    return Path(value).expanduser()


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
