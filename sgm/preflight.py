"""Whether a configuration can work, found out before any weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from sgm.checkpoint.find import (
    T5Files,
    Weights,
    find_autoencoder,
    find_lora,
    find_t5,
    find_transformer,
)
from sgm.config import Config, LoraChoice
from sgm.errors import UserError, check_known, mistyped_as
from sgm.options import Section, checked
from sgm.util import TARGET_ALIASES

SPATIAL_FACTOR = 8  # of the autoencoder, in height and width
TEMPORAL_FACTOR = 4  # in time, where the configuration names none
_T5_LENGTH = 226  # of texts, where the node of FrozenT5Embedder does not say
_SIZES = ("num_frames", "latent_height", "latent_width", "in_channels")
_WIDTHS = ("hidden_size", "num_attention_heads")


class _NetworkSizes(Section):
    """Sizes of the transformer; those that are needed are checked where they are used."""

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
    """The network's params of a `model` section.

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
            f"model.network_config.params is absent{hint} or holds no keys; name a configuration "
            "that has it, before this one if this goes on top of it"
        )
    checked(_NetworkSizes, params, place=lambda key: f"model.network_config.params.{key}")
    _check_text_length(model, params)
    return params


def _check_text_length(model: Mapping[str, Any], network: Mapping[str, Any]) -> None:
    """Compare the length of texts as the node of T5 and the network's params give it."""
    try:
        (embedder,) = model["conditioner_config"]["params"]["emb_models"]
        is_t5 = TARGET_ALIASES.get(embedder["target"], embedder["target"]) == T5_EMBEDDER
        given = embedder["params"].get("max_length", _T5_LENGTH)
        wanted = network["modules"]["pos_embed_config"]["params"]["text_length"]
    except (KeyError, TypeError, ValueError, AttributeError):  # the parts themselves report these
        return
    if is_t5 and given != wanted:
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
    return (
        args.sampling_num_frames,
        params["in_channels"],
        params["latent_height"],
        params["latent_width"],
    )


T5_EMBEDDER = "sgm.modules.encoders.modules.FrozenT5Embedder"
AUTOENCODER = "sgm.models.autoencoder.VideoAutoencoderInferenceWrapper"
_AUTOENCODER = "first_stage_config"


class WeightPath(NamedTuple):
    """Where a configuration names weights: the `node` with the params, and what it gives.

    `where` is the node's place within the section `model`, and `index` that among the text
    encoders.
    """

    key: Literal["ckpt_path", "model_dir"]
    where: str
    node: Any
    value: Any
    index: int = 0

    def path(self) -> str:
        """The path; UserError where none is set."""
        if self.value and isinstance(self.value, str):
            return self.value
        params = self.node.get("params") if isinstance(self.node, Mapping) else None
        what = mistyped_as(self.key, params) or f" (it is {self.value!r})"
        raise UserError(
            f"model.{self.where}.params.{self.key} is not set{what}: it must be the path of the "
            "weights; without them that part of the model would be random"
        )


def weight_paths(model: Mapping[str, Any]) -> Iterator[WeightPath]:
    """Where a `model` section names weights: the autoencoder's, then those of each T5 embedder.

    A section without an autoencoder gives a path that is not set.
    """
    yield _weight_path(model.get(_AUTOENCODER), "ckpt_path", _AUTOENCODER)
    conditioner = model.get("conditioner_config")
    params = conditioner.get("params") if isinstance(conditioner, Mapping) else None
    embedders = params.get("emb_models") if isinstance(params, Mapping) else None
    is_list = isinstance(embedders, Sequence) and not isinstance(embedders, str)
    for index, node in enumerate(embedders if is_list else []):
        target = node.get("target") if isinstance(node, Mapping) else None
        if isinstance(target, str) and TARGET_ALIASES.get(target, target) == T5_EMBEDDER:
            where = f"conditioner_config.params.emb_models[{index}]"
            yield _weight_path(node, "model_dir", where, index=index)


def _weight_path(node: Any, key: str, where: str, **place: int) -> WeightPath:
    params = node.get("params") if isinstance(node, Mapping) else None
    value = params.get(key) if isinstance(params, Mapping) else None
    return WeightPath(key, where, node, value, **place)


@dataclass(frozen=True)
class RunWeights:
    """The weights of a run, found but not read; None for what the run does not need."""

    transformer: Weights | None
    loras: Sequence[LoraChoice]
    autoencoder: Weights | None
    text_encoders: Mapping[int, T5Files]

    def within(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a `model` section with these objects in the place of their paths."""
        changed = copy.deepcopy(dict(model))
        target = (changed.get(_AUTOENCODER) or {}).get("target")
        # Another class knows paths only.
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

    A part without a file would start from random weights, and its output would be noise. Nothing
    but names and JSON files is looked at, so that no mistake in a path waits for PyTorch.

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
            "args.load is not set: it must name the folder of the transformer's weights"
        )
    transformer = None if random_transformer else find_transformer(load)
    loras = [replace(choice, path=find_lora(choice.path)) for choice in lora]
    vae, *t5 = weight_paths(model)
    autoencoder = None
    if not model.get("latent_input"):
        if model.get(_AUTOENCODER) is None:
            hint = mistyped_as(_AUTOENCODER, model)
            raise UserError(f"model lacks {_AUTOENCODER}{hint}; add it")
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
    """Check the sizes of the videos that a configuration makes, and find its weights.

    Raises:
        UserError: the model does not make videos of that size, or as in `find_weights`.
    """
    latent_shape(config.args, config.model)
    model = config.model | {"latent_input": False}  # of training batches; sampling always decodes
    return find_weights(model, config.args.load, lora=config.args.lora)


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
    check_known(transformer_args, known, where="transformer_args")
    for name, value in transformer_args.items():
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
    check_known(modules, [*required, "lora_config"], where="modules")
    for name in required:
        if not modules.get(name):
            raise UserError(f"modules lacks {name}; add it to network_config.params.modules")
    lora = (modules.get("lora_config") or {}).get("params") or {}
    if modules.get("lora_config"):
        checked(_LoraSettings, lora, place=lambda key: f"lora_config: {key}")
    outside = [i for i in lora.get("layer_range") or [] if not 0 <= i < num_layers]
    if outside:
        raise UserError(f"lora_config: layer_range names layer {outside[0]} of {num_layers} layers")
