"""Check a configuration before PyTorch is imported: sizes of the model and paths of weights."""

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


SPATIAL_FACTOR = 8  # video pixels per latent pixel, in height and in width
TEMPORAL_FACTOR = 4  # default of time_compressed_rate
T5_EMBEDDER = "sgm.modules.encoders.modules.FrozenT5Embedder"
AUTOENCODER = "sgm.models.autoencoder.VideoAutoencoderInferenceWrapper"
_FIRST_STAGE = "first_stage_config"
_T5_LENGTH = 226  # default of FrozenT5Embedder's max_length


def _at(section: object, *keys: str) -> Any:  # noqa: ANN401 (a value of a file)
    """Return the value at the path `keys` through nested sections; None if a key is missing."""
    for key in keys:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section


class VideoSizes(Section):
    """The params of ``network_config`` that determine the sizes of a model's videos."""

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
        """Height and width of a frame in pixels, fixed by the size of the position table."""
        return [self.latent_height * SPATIAL_FACTOR, self.latent_width * SPATIAL_FACTOR]

    @property
    def lengths(self) -> dict[int, int]:
        """All possible numbers of latent frames → number of video frames, in ascending order.

        The number of latent frames is odd, because the decoder takes three frames first (or only
        one), and then two at a time. The position table limits the number.
        """
        factor = self.time_compressed_rate
        most = (self.num_frames - 1) // factor + 1
        return {n: factor * (n - 1) + 1 for n in range(1, most + 1, 2)}


class _Widths(Section):
    """The params of ``network_config`` that determine the width of an attention head."""

    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)


class _SatArgs(Options):
    """Settings of SAT's transformer. Only one form of the model exists; other values are errors."""

    checkpoint_activations: bool = False
    skip_init: bool = False
    layernorm_order: Literal["pre"] = "pre"
    is_decoder: Literal[False] = False
    model_parallel_size: int = Field(1, ge=1, le=1)
    # Sizes of SAT's word and 1D position embeddings. This model does not have these embeddings.
    vocab_size: Any = None
    max_sequence_length: Any = None


class _LoraSettings(Section):
    """Params of the node ``lora_config``."""

    r: int = Field(ge=1)
    lora_alpha: float = 1
    lora_dropout: float = Field(0, ge=0, le=1)
    layer_range: list[int] | None = None


def _network_params(model: Mapping[str, Any], kind: type[Params]) -> Params:
    """Check the network's params in a `model` section, and return them as an object of `kind`."""
    if not model:
        raise UserError(
            "the configuration has no section 'model'; put a file with this section before this one"
        )
    node = model.get("network_config")
    params = _at(node, "params")
    if not params or not isinstance(params, Mapping):
        hint = mistyped_as("network_config", model) or mistyped_as("params", node)
        raise UserError(
            f"model.network_config.params is missing{hint} or contains no keys; add it, or put a "
            "configuration that contains it before this one"
        )
    return checked(kind, params, place=lambda key: f"model.network_config.params.{key}")


def check_model_section(model: Mapping[str, Any]) -> VideoSizes:
    """Check a `model` section, and return the sizes of the videos that its network makes.

    Raises:
        UserError: the section or the node is missing, a size is missing or not a positive whole
            number, or a T5 embedder's `max_length` differs from the network's `text_length`.
    """
    sizes = _network_params(model, VideoSizes)
    wanted = _at(sizes.model_extra, "modules", "pos_embed_config", "params", "text_length")
    for index, node in _t5_nodes(model):
        length = _at(node, "params", "max_length")
        given = _T5_LENGTH if length is None else length
        if wanted not in (None, given):
            raise UserError(
                f"model.conditioner_config.params.emb_models[{index}].params.max_length: {given!r} "
                f"must be {wanted!r}, the text_length in network_config.params.modules."
                "pos_embed_config"
            )
    return sizes


def head_size(model: Mapping[str, Any]) -> int:
    """Return the width of an attention head of the network in a `model` section.

    Raises:
        UserError: a size is missing or not a positive whole number.
    """
    widths = _network_params(model, _Widths)
    return widths.hidden_size // widths.num_attention_heads


def num_latent_frames(num_frames: int, model: Mapping[str, Any]) -> int:
    """Return the number of latent frames of a video with `num_frames` frames.

    Raises:
        UserError: the model does not make videos of this length; the message lists the possible
            lengths.
    """
    lengths = {frames: n for n, frames in check_model_section(model).lengths.items()}
    if type(num_frames) is not int or num_frames not in lengths:
        raise UserError(
            f"num_frames={num_frames!r} is not possible with this model; allowed numbers of video "
            f"frames: {', '.join(map(str, lengths))}"
        )
    return lengths[num_frames]


def latent_shape(args: SamplingArgs, model: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Return the shape (t, c, h, w) of a sample's latents.

    Raises:
        UserError: the model does not make videos of this size; the message states the possible
            sizes.
    """
    sizes = check_model_section(model)
    if args.sampling_num_frames not in sizes.lengths:
        frames = ", ".join(f"{n} ({frames})" for n, frames in sizes.lengths.items())
        raise UserError(
            f"sampling_num_frames={args.sampling_num_frames} is not a possible number of latent "
            f"frames; this model allows (video frames in brackets): {frames}"
        )
    if args.sampling_image_size != sizes.image_size:
        raise UserError(
            f"sampling_image_size={args.sampling_image_size}: this model makes only videos of "
            f"{sizes.image_size} (height, width), because its position table has that size"
        )
    if args.latent_channels != sizes.in_channels:
        raise UserError(
            f"latent_channels={args.latent_channels}, but the model has in_channels="
            f"{sizes.in_channels}; set latent_channels to that number"
        )
    return (args.sampling_num_frames, *sizes.frame_shape)


def _t5_nodes(model: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """For each T5 embedder of a `model` section, yield its index in `emb_models` and its node."""
    nodes = _at(model, "conditioner_config", "params", "emb_models")
    is_list = isinstance(nodes, Sequence) and not isinstance(nodes, str)
    for index, node in enumerate(nodes if is_list else ()):
        if _at(node, "target") == T5_EMBEDDER:
            yield index, node


@dataclass(frozen=True)
class WeightPath:
    """A key of the `model` section whose value is the path of weights.

    Attributes:
        where: where the params are within the section, such as ``first_stage_config.params``.
        key: the name of the key.
        params: the params that contain the key. They are not checked yet, and may have any type.
    """

    where: str
    key: str
    params: Any

    @property
    def value(self) -> object:
        """The value of the key, of any type; None if the key is missing."""
        return _at(self.params, self.key)

    def path(self) -> str:
        """Return the path, or raise UserError if the key is not set."""
        if self.value and isinstance(self.value, str):
            return self.value
        what = mistyped_as(self.key, self.params) or f" (it is {self.value!r})"
        raise UserError(
            f"model.{self.where}.{self.key} is not set{what}; set it to the path of the weights, "
            "because this part of the model would be random without them"
        )


def weight_paths(model: Mapping[str, Any]) -> Iterator[WeightPath]:
    """Yield the keys that name weights in a `model` section.

    The autoencoder's key comes first (without a value if the section does not set it). The key of
    each T5 embedder follows.
    """
    params = _at(model, _FIRST_STAGE, "params")
    yield WeightPath(f"{_FIRST_STAGE}.params", "ckpt_path", params)
    for index, node in _t5_nodes(model):
        where = f"conditioner_config.params.emb_models[{index}].params"
        yield WeightPath(where, "model_dir", node.get("params"))


@dataclass(frozen=True)
class RunWeights:
    """The weight files of a run, found but not yet read; None for a part that is not needed."""

    transformer: Weights | None
    loras: Sequence[LoraChoice]
    autoencoder: Weights | None
    text_encoders: Sequence[T5Files]

    def within(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a `model` section in which these objects replace the paths."""
        changed = copy.deepcopy(dict(model))
        vae, *t5 = weight_paths(changed)
        target = _at(changed, _FIRST_STAGE, "target")
        # Other autoencoder classes accept only paths.
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

    All paths are required, because a part without weights would be random and its output noise.
    Only file names and JSON files are read, so that a wrong path is reported before PyTorch is
    imported.

    Args:
        model: the `model` section; with ``latent_input: true`` no autoencoder is needed.
        load: `args.load`.
        lora: `args.lora`, which is merged into the transformer's weights.
        random_transformer: the transformer starts from random weights, so `load` is not needed.

    Raises:
        UserError: a path is not set, or does not lead to weights of the expected kind.
    """
    if not load and not random_transformer:
        raise UserError(
            "args.load is not set; set it to the folder of the transformer's weights (only mode: "
            "pretrain does not need it)"
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
    """Check the video sizes of a configuration for sampling, and find its weights.

    Raises:
        UserError: the model does not make videos of this size, or `find_weights` raises it.
    """
    latent_shape(config.args, config.model)
    # latent_input is for training; sampling always needs the decoder.
    model = config.model | {"latent_input": False}
    return find_weights(model, config.args.load, lora=config.args.lora)


def check_divides(name: str, divisor: int, **divided: int) -> None:
    """Check that a size is a multiple of `divisor`.

    Args:
        name: the name of the divisor, for the message.
        divisor: the divisor.
        divided: the size, as one keyword argument under its name.

    Raises:
        UserError: the size is not a multiple of the divisor, or one of the two is below 1.
    """
    ((divided_name, size),) = divided.items()
    if divisor < 1 or size < 1 or size % divisor:
        raise UserError(f"{divided_name}={size} is not a multiple of {name}={divisor}")


def check_transformer_args(transformer_args: Mapping[str, Any]) -> None:
    """Check the settings of SAT's transformer.

    Raises:
        UserError: a setting is unknown, or has a value that is not supported.
    """
    checked(_SatArgs, transformer_args, place=lambda key: f"transformer_args.{key}".rstrip("."))


def check_modules(modules: Mapping[str, Any], *, parts: Iterable[str], num_layers: int) -> None:
    """Check that each part of the model has a node in `modules`, and check the LoRA settings.

    Args:
        modules: the section ``network_config.params.modules``.
        parts: names of the required parts; the node of a part is ``{name}_config``.
        num_layers: number of the network's layers, which limits LoRA's ``layer_range``.

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
                f"lora_config: layer_range contains layer {outside[0]}, but the model has "
                f"{num_layers} layers, numbered from 0"
            )
