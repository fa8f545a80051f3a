"""Checks of a configuration before PyTorch is imported: sizes of the model, paths of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

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
from sgm.options import Options, Section, checked
from sgm.util import TARGET_ALIASES, check_number

Params = TypeVar("Params", bound=Section)


SPATIAL_FACTOR = 8  # pixels of a latent, in height and width
TEMPORAL_FACTOR = 4  # default of time_compressed_rate
T5_EMBEDDER = "sgm.modules.encoders.modules.FrozenT5Embedder"
AUTOENCODER = "sgm.models.autoencoder.VideoAutoencoderInferenceWrapper"
_FIRST_STAGE = "first_stage_config"
_T5_LENGTH = 226  # default of FrozenT5Embedder's max_length


def _at(section: object, *keys: str) -> Any:  # noqa: ANN401 (a value of a file)
    """The value at a path of keys through nested sections; None if a part of it is missing."""
    for key in keys:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section


class VideoSizes(Section):
    """The params of ``network_config`` that decide which videos a model makes."""

    num_frames: int = Field(ge=1)
    latent_height: int = Field(ge=1)
    latent_width: int = Field(ge=1)
    in_channels: int = Field(ge=1)
    time_compressed_rate: int = Field(TEMPORAL_FACTOR, ge=1)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of a latent frame."""
        return self.in_channels, self.latent_height, self.latent_width

    @property
    def image_size(self) -> list[int]:
        """Height and width of a frame in pixels, which the position table fixes."""
        return [self.latent_height * SPATIAL_FACTOR, self.latent_width * SPATIAL_FACTOR]

    @property
    def lengths(self) -> dict[int, int]:
        """Number of latent frames → number of video frames, in ascending order.

        Latent frames are odd in number: the decoder takes three (or a single one), then two at a
        time. The most are those of the position table.
        """
        factor = self.time_compressed_rate
        most = (self.num_frames - 1) // factor + 1
        return {n: factor * (n - 1) + 1 for n in range(1, most + 1, 2)}


class _Widths(Section):
    """The params of ``network_config`` that decide the width of an attention head."""

    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)


class _SatArgs(Options):
    """Settings of SAT's transformer. The model is built in one form; other values are errors."""

    checkpoint_activations: bool = False
    skip_init: bool = False
    layernorm_order: Literal["pre"] = "pre"
    is_decoder: Literal[False] = False
    model_parallel_size: int = Field(1, ge=1, le=1)
    # Sizes of SAT's embeddings of words and 1D positions, which this model does not have.
    vocab_size: Any = None
    max_sequence_length: Any = None


class _LoraSettings(Section):
    """Params of the node ``lora_config``."""

    r: int = Field(ge=1)
    lora_alpha: float = 1
    lora_dropout: float = Field(0, ge=0, le=1)
    layer_range: list[int] | None = None


def _network_params(model: Mapping[str, Any], kind: type[Params]) -> Params:
    """The network's params of a `model` section that are fields of `kind`, checked."""
    if not model:
        raise UserError(
            "the configuration has no section 'model'; name a file that has it before this one"
        )
    node = model.get("network_config")
    params = _at(node, "params")
    if not params or not isinstance(params, Mapping):
        hint = mistyped_as("network_config", model) or mistyped_as("params", node)
        raise UserError(
            f"model.network_config.params is missing{hint} or holds no keys; name a configuration "
            "that has it, before this one if this one changes a few keys only"
        )
    return checked(kind, params, place=lambda key: f"model.network_config.params.{key}")


def check_model_section(model: Mapping[str, Any]) -> VideoSizes:
    """Return the sizes of the videos that the network of a `model` section makes.

    Raises:
        UserError: the section or the node is missing, a size is missing or not a positive whole
            number, or the length of texts is not the network's.
    """
    sizes = _network_params(model, VideoSizes)
    wanted = _at(sizes.model_extra, "modules", "pos_embed_config", "params", "text_length")
    for index, node in _t5_nodes(model):
        length = _at(node, "params", "max_length")
        given = _T5_LENGTH if length is None else length
        if wanted not in (None, given):
            raise UserError(
                f"model.conditioner_config.params.emb_models[{index}].params.max_length: {given!r} "
                f"must be {wanted!r}, text_length in network_config.params.modules.pos_embed_config"
            )
    return sizes


def head_size(model: Mapping[str, Any]) -> int:
    """Width of an attention head of the network in a `model` section.

    Raises:
        UserError: a size is missing or not a positive whole number.
    """
    widths = _network_params(model, _Widths)
    return widths.hidden_size // widths.num_attention_heads


def num_latent_frames(num_frames: int, model: Mapping[str, Any]) -> int:
    """Latent frames of a video of `num_frames` frames.

    Raises:
        UserError: the model does not make videos of this length; the message lists the lengths.
    """
    lengths = {frames: n for n, frames in check_model_section(model).lengths.items()}
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
    sizes = check_model_section(model)
    if args.sampling_num_frames not in sizes.lengths:
        frames = ", ".join(f"{n} ({frames})" for n, frames in sizes.lengths.items())
        raise UserError(
            f"sampling_num_frames={args.sampling_num_frames} counts latent frames; this model "
            f"allows (video frames in brackets): {frames}"
        )
    if args.sampling_image_size != sizes.image_size:
        raise UserError(
            f"sampling_image_size={args.sampling_image_size}: this model makes videos of "
            f"{sizes.image_size} (height, width) only, the size of its position table"
        )
    if args.latent_channels != sizes.in_channels:
        raise UserError(
            f"latent_channels={args.latent_channels}, but the model has in_channels="
            f"{sizes.in_channels}; set latent_channels to that"
        )
    return (args.sampling_num_frames, *sizes.frame_shape)


def _t5_nodes(model: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and node of each T5 embedder of a `model` section."""
    nodes = _at(model, "conditioner_config", "params", "emb_models")
    is_list = isinstance(nodes, Sequence) and not isinstance(nodes, str)
    for index, node in enumerate(nodes if is_list else ()):
        if _at(node, "target") == T5_EMBEDDER:
            yield index, node


@dataclass(frozen=True)
class WeightPath:
    """A key of the `model` section that names weights.

    Attributes:
        where: place of the params within the section, such as ``first_stage_config.params``.
        key: name of the key.
        params: the params that have the key, of any type until they are checked.
    """

    where: str
    key: str
    params: Any

    @property
    def value(self) -> object:
        """Value of the key, of any type; None if it is missing."""
        return _at(self.params, self.key)

    def path(self) -> str:
        """The path; raises UserError if the key is not set."""
        if self.value and isinstance(self.value, str):
            return self.value
        what = mistyped_as(self.key, self.params) or f" (it is {self.value!r})"
        raise UserError(
            f"model.{self.where}.{self.key} is not set{what}: it must be the path of the weights; "
            "without them this part of the model would be random"
        )


def weight_paths(model: Mapping[str, Any]) -> Iterator[WeightPath]:
    """List the keys that name weights in a `model` section.

    The first is the autoencoder's, not set if the section has none; then those of each T5 embedder.
    """
    params = _at(model, _FIRST_STAGE, "params")
    yield WeightPath(f"{_FIRST_STAGE}.params", "ckpt_path", params)
    for index, node in _t5_nodes(model):
        where = f"conditioner_config.params.emb_models[{index}].params"
        yield WeightPath(where, "model_dir", node.get("params"))


@dataclass(frozen=True)
class RunWeights:
    """The weights of a run, found but not read; None for a part that the run does not need."""

    transformer: Weights | None
    loras: Sequence[LoraChoice]
    autoencoder: Weights | None
    text_encoders: Sequence[T5Files]

    def within(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a `model` section with these objects in the place of their paths."""
        changed = copy.deepcopy(dict(model))
        vae, *t5 = weight_paths(changed)
        target = _at(changed, _FIRST_STAGE, "target")
        # Other classes take paths only.
        if self.autoencoder is not None and TARGET_ALIASES.get(target, target) == AUTOENCODER:
            vae.params[vae.key] = self.autoencoder
        for named, files in zip(t5, self.text_encoders, strict=True):
            named.params[named.key] = files
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
        if model.get(_FIRST_STAGE) is None:
            hint = mistyped_as(_FIRST_STAGE, model)
            raise UserError(f"model.{_FIRST_STAGE} is missing{hint}; add it")
        autoencoder = find_autoencoder(vae.path())
    text_encoders = [
        find_t5(named.path(), option=f"model.{named.where}.{named.key}") for named in t5
    ]
    return RunWeights(transformer, loras, autoencoder, text_encoders)


def check_sampling(config: Config) -> RunWeights:
    """Check the sizes of the videos of a configuration, and find its weights.

    Raises:
        UserError: the model does not make videos of this size, or as in `find_weights`.
    """
    latent_shape(config.args, config.model)
    model = config.model | {"latent_input": False}  # it is for training; sampling always decodes
    return find_weights(model, config.args.load, lora=config.args.lora)


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
    checked(_SatArgs, transformer_args, place=lambda key: f"transformer_args.{key}".rstrip("."))


def check_modules(modules: Mapping[str, Any], *, parts: Iterable[str], num_layers: int) -> None:
    """Check that each of the `parts` of the model has a node, and check LoRA's settings.

    Raises:
        UserError: a node is missing or unknown, or a setting is out of range.
    """
    check_number("num_layers", num_layers, low=1, whole=True)
    required = [f"{name}_config" for name in parts]
    check_known(modules, [*required, "lora_config"], where="modules")
    for name in required:
        if not modules.get(name):
            raise UserError(f"network_config.params.modules.{name} is missing; add it")
    if node := modules.get("lora_config"):
        settings = node.get("params") or {}
        lora = checked(_LoraSettings, settings, place=lambda key: f"lora_config: {key}")
        outside = [i for i in lora.layer_range or [] if not 0 <= i < num_layers]
        if outside:
            raise UserError(
                f"lora_config: layer_range names layer {outside[0]} of {num_layers} layers"
            )
