"""Checks of a configuration before PyTorch is imported: sizes of the model, paths of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from sgm.checkpoint.find import (
    T5Files,
    Weights,
    find_autoencoder,
    find_lora,
    find_t5,
    find_transformer,
)
from sgm.config import Config, LoraChoice, SamplingArgs
from sgm.errors import UserError, check_known, mistyped_as
from sgm.options import Section, checked
from sgm.util import TARGET_ALIASES

SPATIAL_FACTOR = 8  # pixels of a latent, in height and width
TEMPORAL_FACTOR = 4  # default of time_compressed_rate
_T5_LENGTH = 226  # default of FrozenT5Embedder's max_length
_SIZES = ("num_frames", "latent_height", "latent_width", "in_channels")
_WIDTHS = ("hidden_size", "num_attention_heads")


class _NetworkSizes(Section):
    """Sizes of the transformer. `require_sizes` checks that those in use are present."""

    num_frames: int = Field(1, ge=1)
    latent_height: int = Field(1, ge=1)
    latent_width: int = Field(1, ge=1)
    in_channels: int = Field(1, ge=1)
    hidden_size: int = Field(1, ge=1)
    num_attention_heads: int = Field(1, ge=1)
    time_compressed_rate: int = Field(TEMPORAL_FACTOR, ge=1)


class _LoraSettings(Section):
    """Params of the node ``lora_config``."""

    r: int = Field(ge=1)
    lora_alpha: float = 1
    lora_dropout: float = Field(0, ge=0, le=1)


def check_model_section(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the network's params of a `model` section, checked.

    Raises:
        UserError: the section or the node is missing, a size is not a positive whole number, or
            the length of texts is not the network's.
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
            f"model.network_config.params is missing{hint} or holds no keys; name a configuration "
            "that has it, before this one if this one changes a few keys only"
        )
    checked(_NetworkSizes, params, place=lambda key: f"model.network_config.params.{key}")
    _check_text_length(model, params)
    return params


def _check_text_length(model: Mapping[str, Any], network: Mapping[str, Any]) -> None:
    """Raise UserError if T5 and the network disagree about the number of text tokens."""
    try:
        (embedder,) = model["conditioner_config"]["params"]["emb_models"]
        is_t5 = TARGET_ALIASES.get(embedder["target"], embedder["target"]) == T5_EMBEDDER
        given = embedder["params"].get("max_length", _T5_LENGTH)
        wanted = network["modules"]["pos_embed_config"]["params"]["text_length"]
    except (KeyError, TypeError, ValueError, AttributeError):  # reported when the parts are built
        return
    if is_t5 and given != wanted:
        raise UserError(
            f"model.conditioner_config.params.emb_models[0].params.max_length: {given!r} must be "
            f"{wanted!r}, text_length in model.network_config.params.modules.pos_embed_config"
        )


def require_sizes(params: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Check that sizes are present; `check_model_section` has checked their values.

    Raises:
        UserError: one is missing.
    """
    for key in keys:
        if key not in params:
            raise UserError(
                f"model.network_config.params.{key} is missing{mistyped_as(key, params)}; add it, "
                "a whole number"
            )


def head_size(model: Mapping[str, Any]) -> int:
    """Width of an attention head of the network in a `model` section.

    Raises:
        UserError: as in `check_model_section`, or a size is missing.
    """
    params = check_model_section(model)
    require_sizes(params, _WIDTHS)
    return params["hidden_size"] // params["num_attention_heads"]


def video_size(params: Mapping[str, Any]) -> list[int]:
    """Height and width in pixels of the network's videos, which its position table fixes."""
    return [params[key] * SPATIAL_FACTOR for key in ("latent_height", "latent_width")]


def _temporal_factor(params: Mapping[str, Any]) -> int:
    return params.get("time_compressed_rate", TEMPORAL_FACTOR)


def allowed_num_frames(params: Mapping[str, Any]) -> list[int]:
    """Numbers of latent frames that can be sampled: odd, up to the size of the position table.

    The decoder takes three latent frames (or a single one), then two at a time.
    """
    return list(range(1, (params["num_frames"] - 1) // _temporal_factor(params) + 2, 2))


def num_latent_frames(num_frames: int, model: Mapping[str, Any]) -> int:
    """Latent frames of a video of `num_frames` frames.

    Raises:
        UserError: the model does not make videos of this length; the message lists the lengths.
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


def latent_shape(args: SamplingArgs, model: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Shape (t, c, h, w) of a sample's latents.

    Raises:
        UserError: the model does not make videos of this size; the message says which it makes.
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
            f"{size} (height, width) only, the size of its position table"
        )
    if args.latent_channels != params["in_channels"]:
        raise UserError(
            f"latent_channels={args.latent_channels}, but the model has in_channels="
            f"{params['in_channels']}; set latent_channels to that"
        )
    return (
        args.sampling_num_frames,
        params["in_channels"],
        params["latent_height"],
        params["latent_width"],
    )


T5_EMBEDDER = "sgm.modules.encoders.modules.FrozenT5Embedder"
AUTOENCODER = "sgm.models.autoencoder.VideoAutoencoderInferenceWrapper"
_AUTOENCODER = "first_stage_config"


@dataclass(frozen=True)
class WeightPath:
    """A key of the `model` section that names weights.

    Attributes:
        key: name of the param.
        where: place of the node within the section.
        node: the node with the params, of any type until it is checked.
        value: the value of the param, of any type; None if it is missing.
        index: number of the text encoder.
    """

    key: str
    where: str
    node: object
    value: object
    index: int = 0

    def path(self) -> str:
        """The path; raises UserError if the key is not set."""
        if self.value and isinstance(self.value, str):
            return self.value
        params = self.node.get("params") if isinstance(self.node, Mapping) else None
        what = mistyped_as(self.key, params) or f" (it is {self.value!r})"
        raise UserError(
            f"model.{self.where}.params.{self.key} is not set{what}: it must be the path of the "
            "weights; without them this part of the model would be random"
        )


def weight_paths(model: Mapping[str, Any]) -> Iterator[WeightPath]:
    """List the keys that name weights in a `model` section.

    The first is the autoencoder's, not set if the section has none; then those of each T5 embedder.
    """
    yield _weight_path(model.get(_AUTOENCODER), "ckpt_path", _AUTOENCODER)
    conditioner = model.get("conditioner_config")
    params = conditioner.get("params") if isinstance(conditioner, Mapping) else None
    embedders = params.get("emb_models") if isinstance(params, Mapping) else None
    is_list = isinstance(embedders, Sequence) and not isinstance(embedders, str)
    for index, node in enumerate(embedders if is_list else ()):
        target = node.get("target") if isinstance(node, Mapping) else None
        if isinstance(target, str) and TARGET_ALIASES.get(target, target) == T5_EMBEDDER:
            where = f"conditioner_config.params.emb_models[{index}]"
            yield _weight_path(node, "model_dir", where, index=index)


def _weight_path(node: object, key: str, where: str, **place: int) -> WeightPath:
    params = node.get("params") if isinstance(node, Mapping) else None
    value = params.get(key) if isinstance(params, Mapping) else None
    return WeightPath(key, where, node, value, **place)


@dataclass(frozen=True)
class RunWeights:
    """The weights of a run, found but not read; None for a part that the run does not need."""

    transformer: Weights | None
    loras: Sequence[LoraChoice]
    autoencoder: Weights | None
    text_encoders: Mapping[int, T5Files]

    def within(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a `model` section with these objects in the place of their paths."""
        changed = copy.deepcopy(dict(model))
        target = (changed.get(_AUTOENCODER) or {}).get("target", "")
        # Other classes take paths only.
        if self.autoencoder is not None and TARGET_ALIASES.get(target, target) == AUTOENCODER:
            changed[_AUTOENCODER]["params"]["ckpt_path"] = self.autoencoder
        for index, files in self.text_encoders.items():
            node = changed["conditioner_config"]["params"]["emb_models"][index]
            node["params"]["model_dir"] = files
        return changed


def find_weights(
    model: Mapping[str, Any],
    load: str | None,
    *,
    lora: Sequence[LoraChoice] = (),
    random_transformer: bool = False,
) -> RunWeights:
    """Find `load`, `lora`, the autoencoder's `ckpt_path` and every T5 embedder's `model_dir`.

    A part without a file would start from random weights, and its output would be noise. Only
    names and JSON files are read, so a mistake in a path is reported before PyTorch is imported.

    Args:
        model: the `model` section; with ``latent_input: true`` no autoencoder is needed.
        load: `args.load`.
        lora: `args.lora`, merged into these weights.
        random_transformer: `load` is not needed, the transformer is trained from nothing.

    Raises:
        UserError: a path is not set, or nothing of the expected kind is there.
    """
    if not load and not random_transformer:
        raise UserError(
            "args.load is not set: it must name the folder of the transformer's weights; only "
            "training with mode: pretrain starts without"
        )
    transformer = None if random_transformer or not load else find_transformer(load)
    loras = [replace(choice, path=find_lora(choice.path)) for choice in lora]
    vae, *t5 = weight_paths(model)
    autoencoder = None
    if not model.get("latent_input"):
        if model.get(_AUTOENCODER) is None:
            hint = mistyped_as(_AUTOENCODER, model)
            raise UserError(f"model.{_AUTOENCODER} is missing{hint}; add it")
        autoencoder = find_autoencoder(vae.path())
    text_encoders = {}
    for named in t5:
        path = Path(named.path()).expanduser()
        if not path.is_dir():
            raise UserError(
                f"model.{named.where}.params.model_dir: the T5 folder {path} does not exist "
                f"(model_dir {str(path)!r} is not a folder); README tells where to get it"
            )
        text_encoders[named.index] = find_t5(path)
    return RunWeights(transformer, loras, autoencoder, text_encoders)


def check_sampling(config: Config) -> RunWeights:
    """Check the sizes of the videos of a configuration, and find its weights.

    Raises:
        UserError: the model does not make videos of this size, or as in `find_weights`.
    """
    latent_shape(config.args, config.model)
    model = config.model | {"latent_input": False}  # it is for training; sampling always decodes
    return find_weights(model, config.args.load, lora=config.args.lora)


_USED_TRANSFORMER_ARGS = ("checkpoint_activations", "skip_init")
# The model is built in one form; other values are errors.
_FIXED_TRANSFORMER_ARGS = {"layernorm_order": "pre", "is_decoder": False, "model_parallel_size": 1}
# Sizes of SAT's embeddings of words and 1D positions, which this model does not have.
_UNUSED_TRANSFORMER_ARGS = ("vocab_size", "max_sequence_length")


def check_divides(name: str, divisor: int, **divided: int) -> None:
    """Check that one size is a multiple of another.

    Args:
        name, divisor: the divisor and its name.
        divided: the name and value of the other size.

    Raises:
        UserError: it is not a multiple, or one of them is below 1.
    """
    ((divided_name, size),) = divided.items()
    if divisor < 1 or size < 1 or size % divisor:
        raise UserError(f"{divided_name}={size} is not a multiple of {name}={divisor}")


def check_transformer_args(transformer_args: Mapping[str, Any]) -> None:
    """Check the settings of SAT's transformer.

    Raises:
        UserError: one is unknown, or has a value that is not supported.
    """
    known = {*_USED_TRANSFORMER_ARGS, *_FIXED_TRANSFORMER_ARGS, *_UNUSED_TRANSFORMER_ARGS}
    check_known(transformer_args, known, where="transformer_args")
    for name, value in transformer_args.items():
        if name in _FIXED_TRANSFORMER_ARGS and value != _FIXED_TRANSFORMER_ARGS[name]:
            raise UserError(
                f"{name}={value!r} in transformer_args: this model is built with "
                f"{_FIXED_TRANSFORMER_ARGS[name]!r} only"
            )


def check_modules(modules: Mapping[str, Any], *, parts: Iterable[str], num_layers: int) -> None:
    """Check that each of the `parts` of the model has a node, and check LoRA's settings.

    Raises:
        UserError: a node is missing or unknown, or a setting is out of range.
    """
    if num_layers < 1:
        raise UserError(f"num_layers={num_layers}: at least 1 is needed")
    required = [f"{name}_config" for name in parts]
    check_known(modules, [*required, "lora_config"], where="modules")
    for name in required:
        if not modules.get(name):
            raise UserError(f"network_config.params.modules.{name} is missing; add it")
    lora = (modules.get("lora_config") or {}).get("params") or {}
    if modules.get("lora_config"):
        checked(_LoraSettings, lora, place=lambda key: f"lora_config: {key}")
    outside = [i for i in lora.get("layer_range") or [] if not 0 <= i < num_layers]
    if outside:
        raise UserError(f"lora_config: layer_range names layer {outside[0]} of {num_layers} layers")
