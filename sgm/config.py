"""The options of sample_video.py and train_video.py, and how they are read from YAML and flags.

The files of ``--base a.yaml b.yaml`` are merged in this order; flags override the files.
`SamplingArgs` and `TrainingArgs` have a field for every key of the section `args`. The flags, the
checks and docs/configuration.md are derived from these fields. This module imports nothing heavy,
so mistakes are reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, InstanceOf, field_validator, model_validator
from yaml import YAMLError

from sgm.errors import UserError, check_known
from sgm.files import exists
from sgm.options import Options, checked, option
from sgm.util import is_finite_number

if TYPE_CHECKING:
    from sgm.checkpoint.find import Weights


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA to merge.

    Args:
        path: the folder of a run or checkpoint, or a file (see `sgm.checkpoint.lora.read_updates`).
            `find_weights` replaces the path by the `Weights` that it finds there.
        scale: the strength. 1 applies the LoRA as trained, 0 has no effect, and a negative value
            has the opposite effect.
    """

    path: str | Weights
    scale: float = 1.0


def lora_from_text(text: str) -> LoraChoice:
    """Parse ``PATH`` or ``PATH:SCALE``; if `text` as a whole is an existing path, it has no scale.

    Raises:
        UserError: the scale is not a finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or not path or exists(text):
        return LoraChoice(text)
    try:
        scale = float(number)
    except ValueError:
        if exists(path):
            raise UserError(
                f"{text}: {colon + number!r} is not a number; write the strength after the colon, "
                "for example PATH:0.8"
            ) from None
        return LoraChoice(text)  # the colon is part of the path
    return _lora_from_item({"path": path, "scale": scale})


def _lora_from_item(item: object) -> LoraChoice:
    """Convert an item of the list ``lora:``, either a path or ``{path, scale}``."""
    if isinstance(item, LoraChoice):
        return item
    if isinstance(item, str) and item:
        return lora_from_text(item)
    if not isinstance(item, Mapping):
        raise UserError(
            f"{item!r} is not a LoRA: write a path, or {{path: …, scale: …}}, or a list of these"
        )
    check_known(item, ("path", "scale"), where=str(dict(item)))
    path, scale = item.get("path"), item.get("scale", 1.0)
    if not isinstance(path, str) or not path:
        raise UserError(f"{dict(item)} has no path; add the path of the LoRA's folder or file")
    if not is_finite_number(scale):
        raise UserError(
            f"scale {scale!r} of {path} must be a finite number; 1 applies the LoRA as trained"
        )
    return LoraChoice(path, float(scale))


def _validate_lora(item: object) -> LoraChoice:
    try:
        return _lora_from_item(item)
    except UserError as error:  # for a ValueError, pydantic reports which item it is
        raise ValueError(str(error)) from None


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


# A single value is accepted where a list is expected.
Texts = Annotated[list[str], BeforeValidator(_as_list)]
Numbers = Annotated[list[int], BeforeValidator(_as_list)]
Loras = Annotated[
    list[Annotated[InstanceOf[LoraChoice], BeforeValidator(_validate_lora)]],
    BeforeValidator(_as_list),
]

_REFERENCE = re.compile(r"\$\{[^${}:]*\}")  # a reference to another value, such as ${args.seed}

# Errors that the YAML loader raises: ValueError if the text is not UTF-8 or a number is invalid,
# RecursionError if a list contains itself.
_YAML_ERRORS = (YAMLError, ValueError, RecursionError)

_MAX_NAME_BYTES = 230  # Linux allows 255; a run's time and number come after the name

SECTIONS = ("args", "model", "data", "deepspeed")

# Keys of `args` that occur in published files but have no effect here, with the reason.
IGNORED_ARGS = {
    "force_inference": "missing weights are always an error, unless known to be optional",
    "force_train": "see force_inference",
}


class CommonArgs(Options):
    """Options of both commands."""

    mode: Literal["inference", "finetune", "pretrain"] = option(
        "inference",
        "what the file is for; 'finetune' starts from `load`, 'pretrain' from random weights",
    )
    load: str | None = option(None, "transformer weights: a SAT or diffusers folder, or a file")
    seed: int = option(42, "seed of all random numbers")
    fp16: bool = option(False, "run in float16")
    bf16: bool = option(False, "run in bfloat16")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one")
    model_parallel_size: int = option(1, "for old files; models are not split", ge=1, le=1)

    @model_validator(mode="after")
    def _check_precision(self) -> CommonArgs:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both set; keep only one of them")
        return self

    @property
    def precision(self) -> str:
        """PyTorch's name for the precision of the run, such as ``bfloat16``."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


class SamplingArgs(CommonArgs):
    """Options of sample_video.py."""

    batch_size: int = option(1, "videos for each prompt", ge=1)
    input_type: Literal["txt", "cli"] = option("txt", "txt: read input_file; cli: type prompts")
    input_file: str = option("configs/test.txt", "file of prompts: UTF-8, one per line")
    negative_prompt: str = option("", "what the videos should not show; empty: unconditional")
    latent_channels: int = option(16, "channels of the latents; must match the model")
    sampling_num_frames: int = option(13, "latent frames: n gives 4·(n - 1) + 1 video frames")
    sampling_image_size: Numbers = option([480, 720], "height and width of the video in pixels")
    sampling_fps: int = option(8, "frames per second of the mp4", ge=1)
    parallel: Literal["prompts", "video"] = option(
        "prompts", "how to use several processes: divide the prompts, or each video"
    )
    step_cache: float = option(
        0.0,
        "lossy: reuse steps that change less than this; 0: off, try 0.1",
        ge=0,
    )
    tile_decode: bool = option(False, "decode in tiles: less memory, slightly different videos")
    memory: Literal["auto", "high", "low"] = option(
        "auto",
        "high: all weights on the GPU; low: each part only while in use; auto: high if it fits",
    )
    compile: bool | None = option(None, "compile the blocks; default: on a GPU, from 100 steps on")
    attention: Literal["auto", "hopper", "flash", "sdpa"] = option(
        "auto",
        "kernel: this project's (hopper), FlashAttention-4 (flash) or PyTorch's (sdpa); "
        "auto: the fastest",
    )
    fp8: bool = option(
        False, "compute MLPs in float8: faster on newer GPUs, slightly different videos"
    )
    output_dir: str = option("outputs", "folder for the videos")
    lora: Loras = option([], "LoRAs to merge: folders or files; PATH:0.8 for a strength of 0.8")

    @model_validator(mode="after")
    def _check_step_cache(self) -> SamplingArgs:
        if self.step_cache and self.parallel == "video":
            raise ValueError("step_cache does not work with parallel: video; remove one of them")
        return self


class TrainingArgs(CommonArgs):
    """Options of train_video.py."""

    # Signed 64-bit integers. torch.manual_seed accepts all of them.
    seed: int = option(42, "seed of all random numbers", ge=-(2**63), le=2**63 - 1)
    experiment_name: str = option("finetune", "start of the run folder's name; the time follows")
    resume: str | None = option(None, "run to continue: 'latest', or a run or checkpoint folder")
    train_data: Texts = option([], "folders (or files) of training data")
    valid_data: Texts = option([], "folders (or files) of validation data")
    split: str = option("1,0,0", "for old files; no effect, use train_data and valid_data")
    cache_dir: str | None = option(None, "cache latents and text embeddings in this folder")
    num_workers: int = option(8, "worker processes that load data", ge=0)
    text_device: Literal["auto", "cpu"] = option(
        "auto", "device of the text encoder; auto: same as the transformer"
    )
    train_iters: int = option(1000, "number of optimizer steps", ge=1)
    lr_decay_style: Literal["constant", "linear", "cosine"] = option(
        "linear", "learning rate schedule after the warm-up"
    )
    lr_decay_iters: int | None = option(
        None, "number of steps of the schedule; default: train_iters", ge=1
    )
    lr_decay_ratio: float = option(0.1, "cosine: final fraction of the learning rate", gt=0, le=1)
    warmup: float = option(0.01, "warm-up steps as a fraction of lr_decay_iters", ge=0, le=1)
    auto_warmup_steps: int = option(
        100, "number of first steps with at most 5% of the learning rate", ge=0
    )
    ema_decay: float = option(
        0.0, "decay of the moving average of the weights; 0: off, usual: 0.9999", ge=0, le=0.999999
    )
    nonfinite_limit: int = option(10, "stop after this many non-finite losses in a row", ge=1)
    checkpoint_activations: bool = option(False, "recompute activations to save memory")
    checkpoint_keep: Literal["block", "attention"] = option(
        "block", "activations stored per block: its input, or the attention output too (faster)"
    )
    compile: bool | None = option(None, "compile the blocks; default: on a GPU, from 300 steps on")
    attention: Literal["auto", "flash", "sdpa"] = option(
        "auto", "kernel: FlashAttention-4 (flash) or PyTorch's (sdpa); auto: the fastest available"
    )
    eval_iters: int = option(1, "number of batches per validation", ge=1)
    eval_interval: int = option(100, "steps between validations", ge=1)
    eval_batch_size: int = option(1, "samples per validation batch", ge=1)
    valid_prompts: Texts = option([], "prompts of validation videos; default: from valid_data")
    valid_videos: int = option(1, "videos per validation from captions of valid_data", ge=0)
    only_log_video_latents: bool = option(False, "save validation videos as latents, undecoded")
    save: str = option("ckpts", "folder that contains the run folders", min_length=1)
    save_interval: int = option(100, "steps between checkpoints", ge=1)
    save_total_limit: int = option(0, "keep this many of the newest checkpoints; 0: all", ge=0)
    log_interval: int = option(20, "steps between log lines", ge=1)
    wandb: bool = option(False, "log to Weights & Biases too")
    wandb_project_name: str = option("cogvideox", "project at Weights & Biases")
    no_load_rng: bool = option(True, "for old files; no effect, every run starts from `seed`")
    local_rank: int = option(0, "set by launchers; no effect, the variable LOCAL_RANK counts")

    @field_validator("experiment_name")
    @classmethod
    def _check_experiment_name(cls, name: str) -> str:
        if not name or "/" in name or "\0" in name or len(os.fsencode(name)) > _MAX_NAME_BYTES:
            raise ValueError(
                f"{name!r:.100} must be a folder name: not empty, without a slash and of at most "
                f"{_MAX_NAME_BYTES} bytes"
            )
        return name


@dataclass
class Config:
    """A checked configuration: the options of `args`, and the other sections as plain dicts."""

    args: Any
    model: dict[str, Any]
    data: dict[str, Any]
    deepspeed: dict[str, Any]
    files: list[str]
    allow_target: list[str]

    def place(self, section: str) -> str:
        """Return where a section is, for messages: the names of the files and of the section."""
        return f"configuration {' + '.join(self.files)}: {section}"


def _calls_resolver(text: str) -> bool:
    """Return whether a value contains a call such as ``${oc.env:HOME}``.

    References such as ``${args.seed}`` are not calls. They are removed first, the innermost
    before the outer ones; any ``${`` that remains belongs to a call.
    """
    removed = 1
    while removed:
        text, removed = _REFERENCE.subn("", text)
    return "${" in text


def _check_no_resolvers(value: object, name: str) -> None:
    """Raise UserError if a value of the file `name` calls a resolver."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_no_resolvers(item, name)
    elif isinstance(value, str) and _calls_resolver(value):
        raise UserError(
            f"configuration {name}: {value!r} is not allowed, because YAML files may not read "
            "environment variables or call functions; write the value itself"
        )


def _check_containers(before: object, value: object, name: str, key: str = "") -> None:
    """Raise UserError if a file has a list where an earlier file has a section, or the reverse."""
    if isinstance(before, dict) and isinstance(value, dict):
        for own in before.keys() & value.keys():
            _check_containers(before[own], value[own], name, f"{key}.{own}" if key else str(own))
    elif {type(before), type(value)} == {dict, list}:
        found, wanted = ("a list", "keys") if isinstance(value, list) else ("keys", "a list")
        at = f" at {key}" if key else ""
        raise UserError(f"configuration {name}: found {found}{at}, but expected {wanted}")


def read_yaml(files: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read and merge YAML files.

    Returns:
        The four sections as plain dicts; and, for each section and each of its keys (``args``,
        ``args.seed`` …), the last file that contains it.

    Raises:
        UserError: a file is missing, is not UTF-8 or YAML, calls a resolver, or has an unknown
            section.
    """
    merged: Any = OmegaConf.create({})
    sources: dict[str, str] = {}
    for name in files:
        if not os.path.isfile(name):
            place = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
            raise UserError(f"configuration {name}: no such file{place}; check its path")
        try:
            loaded = OmegaConf.load(name)
            plain: Any = OmegaConf.to_container(loaded, resolve=False)
            _check_no_resolvers(plain, name)
            _check_containers(OmegaConf.to_container(merged, resolve=False), plain, name)
            check_known(plain, SECTIONS, where=f"configuration {name}")
            for key in plain:
                keys = plain[key] if isinstance(plain[key], dict) else ()
                sources |= dict.fromkeys([key, *(f"{key}.{own}" for own in keys)], name)
            merged = OmegaConf.merge(merged, loaded)
        except (*_YAML_ERRORS, OmegaConfBaseException, TypeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"configuration {name} is not valid YAML: {reason}") from None
    try:
        sections: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = ".".join(str(getattr(error, "full_key", "") or "").split(".")[:2])
        place = sources.get(key, " + ".join(files))
        raise UserError(f"configuration {place}: {str(error).splitlines()[0]}") from None
    for name in SECTIONS:
        if not isinstance(sections.get(name) or {}, dict):
            raise UserError(f"configuration {sources[name]}: {name} must contain keys, not a value")
    return {name: sections.get(name) or {} for name in SECTIONS}, sources


def check_given(
    args_class: type[CommonArgs], given: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """Check options that Python code passes, by the same rules as options of a YAML file.

    Args:
        args_class: the options of one of the two commands.
        given: option → value. Values of None are dropped, so the YAML value applies; paths may be
            `os.PathLike`.
        where: the function that was called, for messages.

    Returns:
        The options that were passed, without None and without `IGNORED_ARGS`.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or range.
    """
    plain = {key: as_in_yaml(value) for key, value in given.items() if key not in IGNORED_ARGS}
    plain = {key: value for key, value in plain.items() if value is not None}
    args = checked(args_class, plain, place=lambda key: f"{where}: {key}" if key else where)
    return {key: getattr(args, key) for key in plain}


def as_in_yaml(value: Any) -> Any:  # noqa: ANN401 (values of all types)
    """Convert a Python value to the types that YAML gives: paths to strings, tuples to lists …"""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return [as_in_yaml(item) for item in value] if isinstance(value, list | tuple) else value


def load_config(
    args_class: type[CommonArgs],
    files: Sequence[str],
    given: Mapping[str, Any],
    *,
    allow_target: Sequence[str] = (),
) -> Config:
    """Read and check the YAML files of a run.

    Args:
        args_class: the options of the command; keys of the other command are ignored.
        files: paths of the files, merged in this order.
        given: option → value; these values, such as flags, override the files.
        allow_target: more dotted prefixes under which the files may name classes.

    Raises:
        UserError: a file cannot be used (see `read_yaml`), a key is unknown, or a value has the
            wrong type or range.
    """
    sections, sources = read_yaml(files)

    def place(key: str) -> str:
        if not key:
            return ""  # several options do not fit together; the message names them
        if key in given:
            return f"--{key.replace('_', '-')}"
        # If `args` is a reference to another section, its keys have no entry in `sources`.
        return f"configuration {sources.get(f'args.{key}', sources['args'])}: args.{key}"

    known = {**SamplingArgs.model_fields, **TrainingArgs.model_fields, **IGNORED_ARGS}
    for key in sections["args"]:
        check_known([key], known, where=f"args of {sources.get(f'args.{key}', sources['args'])}")
    own = {key: value for key, value in sections["args"].items() if key in args_class.model_fields}
    values = {key: value for key, value in own.items() if value is not None}  # blank: the default
    if given.get("fp16") or given.get("bf16"):  # this flag replaces the precision of the files
        values |= {"fp16": False, "bf16": False}
    values |= {key: value for key, value in given.items() if key in args_class.model_fields}
    return Config(
        args=checked(args_class, values, place=place),
        model=sections["model"],
        data=sections["data"],
        deepspeed=sections["deepspeed"],
        files=[str(file) for file in files],
        allow_target=list(allow_target),
    )
