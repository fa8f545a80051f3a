"""The options of both commands and the YAML files they come from: one checked configuration.

``--base a.yaml b.yaml`` are merged in this order; a flag wins over the files. `SamplingArgs` and
`TrainingArgs` have a field for every key of the section `args`; the flags, the checks and
docs/configuration.md are derived from them. Nothing heavy is imported here, so that a mistake is
reported at once.
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
        path: a run's folder, a checkpoint's or a file; see `sgm.checkpoint.lora.read_updates`. In a
            run, what `find_lora` found there.
        scale: strength; 1 is as trained, 0 nothing, below 0 the opposite.
    """

    path: str | Weights
    scale: float = 1.0


def lora_from_text(text: str) -> LoraChoice:
    """Parse ``PATH`` or ``PATH:SCALE``; if a path of the whole text exists, it is the path.

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
                "as in PATH:0.8"
            ) from None
        return LoraChoice(text)  # the colon belongs to the path
    return _lora_from_item({"path": path, "scale": scale})


def _lora_from_item(item: object) -> LoraChoice:
    """A LoRA from an item of the list ``lora:``, a path or ``{path, scale}``."""
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
        raise UserError(f"{dict(item)} has no path; add the LoRA's folder or file")
    if not is_finite_number(scale):
        raise UserError(
            f"scale {scale!r} of {path} must be a finite number; 1 is the LoRA as trained"
        )
    return LoraChoice(path, float(scale))


def _validate_lora(item: object) -> LoraChoice:
    try:
        return _lora_from_item(item)
    except UserError as error:  # pydantic adds the place of the item to a ValueError
        raise ValueError(str(error)) from None


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


# A single value where a list is wanted is a list of one.
Texts = Annotated[list[str], BeforeValidator(_as_list)]
Numbers = Annotated[list[int], BeforeValidator(_as_list)]
Loras = Annotated[
    list[Annotated[InstanceOf[LoraChoice], BeforeValidator(_validate_lora)]],
    BeforeValidator(_as_list),
]

_REFERENCE = re.compile(r"\$\{[^${}:]*\}")  # to another value, such as ${args.seed}

# What the loader raises: ValueError for text that is not UTF-8 or for an invalid number,
# RecursionError for a list within itself.
_YAML_ERRORS = (YAMLError, ValueError, RecursionError)

_MAX_NAME_BYTES = 230  # Linux allows 255; a run's time and number come after the name

SECTIONS = ("args", "model", "data", "deepspeed")

# Keys of `args` that published files carry and nothing here needs, with the reason.
IGNORED_ARGS = {
    "force_inference": "weights with real gaps are always an error, expected absences never are",
    "force_train": "as force_inference",
}


class CommonArgs(Options):
    """Options of both commands."""

    mode: Literal["inference", "finetune", "pretrain"] = option(
        "inference", "what the file is for; 'finetune' starts from `load`, 'pretrain' from nothing"
    )
    load: str | None = option(None, "transformer weights: a folder of SAT or diffusers, or a file")
    seed: int = option(42, "seed of all random numbers")
    fp16: bool = option(False, "run in float16")
    bf16: bool = option(False, "run in bfloat16")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one")
    model_parallel_size: int = option(1, "for old files; one model is not split", ge=1, le=1)

    @model_validator(mode="after")
    def _check_precision(self) -> CommonArgs:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both set; keep one of them")
        return self

    @property
    def precision(self) -> str:
        """The name that PyTorch has for the precision of the run."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


class SamplingArgs(CommonArgs):
    """Options of sample_video.py."""

    batch_size: int = option(1, "videos for each prompt", ge=1)
    input_type: Literal["txt", "cli"] = option("txt", "prompts of input_file, or typed in (cli)")
    input_file: str = option("configs/test.txt", "prompts, UTF-8, one on a line")
    negative_prompt: str = option("", "what the videos should not show; empty: unconditional")
    latent_channels: int = option(16, "channels of the latents; the model decides it")
    sampling_num_frames: int = option(13, "latent frames: n gives 4·(n - 1) + 1 video frames")
    sampling_image_size: Numbers = option([480, 720], "height and width of the video in pixels")
    sampling_fps: int = option(8, "frames per second of the mp4", ge=1)
    parallel: Literal["prompts", "video"] = option("prompts", "what several processes divide")
    step_cache: float = option(
        0.0,
        "lossy: reuse steps that change by less; 0: off, try 0.1",
        ge=0,
    )
    tile_decode: bool = option(False, "decode in tiles: less memory, slightly different videos")
    memory: Literal["auto", "high", "low"] = option(
        "auto", "high: all weights on the GPU; low: each part while it works; auto: high if it fits"
    )
    compile: bool | None = option(None, "compile the blocks; default: on a GPU, from 100 steps on")
    attention: Literal["auto", "hopper", "flash", "sdpa"] = option(
        "auto",
        "the kernel: this project's (Hopper), FlashAttention-4 or PyTorch; auto: the fastest",
    )
    fp8: bool = option(False, "MLPs in float8: faster on newer GPUs, slightly different videos")
    output_dir: str = option("outputs", "folder for the videos")
    lora: Loras = option([], "LoRAs to merge: folders or files; PATH:0.8 for a strength of 0.8")

    @model_validator(mode="after")
    def _check_step_cache(self) -> SamplingArgs:
        if self.step_cache and self.parallel == "video":
            raise ValueError("step_cache does not go with parallel: video; leave one of them out")
        return self


class TrainingArgs(CommonArgs):
    """Options of train_video.py."""

    # What torch.manual_seed accepts, less the room for the ranks and epochs that are added to it.
    seed: int = option(42, "seed of all random numbers", ge=-(2**63), le=2**63 - 1)
    experiment_name: str = option("finetune", "the run's folder is this and the time of its start")
    resume: str | None = option(None, "continue a run: latest, or a run's or checkpoint's folder")
    train_data: Texts = option([], "folders (or files) of training data")
    valid_data: Texts = option([], "folders (or files) of validation data")
    split: str = option("1,0,0", "accepted from old files; train_data and valid_data decide")
    cache_dir: str | None = option(None, "keep latents and text embeddings in this folder")
    num_workers: int = option(8, "worker processes that load data", ge=0)
    text_device: Literal["auto", "cpu"] = option("auto", "the text encoder's; auto: the network's")
    train_iters: int = option(1000, "optimizer steps", ge=1)
    lr_decay_style: Literal["constant", "linear", "cosine"] = option("linear", "after the warm-up")
    lr_decay_iters: int | None = option(None, "steps of the decay; default: train_iters", ge=1)
    lr_decay_ratio: float = option(0.1, "the cosine ends at this fraction of lr", gt=0, le=1)
    warmup: float = option(0.01, "fraction of the decay with a rising learning rate", ge=0, le=1)
    auto_warmup_steps: int = option(100, "first steps, with at most 5% of the learning rate", ge=0)
    ema_decay: float = option(0.0, "average the weights; 0: no, usual: 0.9999", ge=0, le=0.999999)
    nonfinite_limit: int = option(10, "stop after this many non-finite losses in a row", ge=1)
    checkpoint_activations: bool = option(False, "recompute activations to save memory")
    checkpoint_keep: Literal["block", "attention"] = option(
        "block", "activations kept of each block: its input, or the attention's output too (faster)"
    )
    compile: bool | None = option(None, "compile the blocks; default: on a GPU, from 300 steps on")
    attention: Literal["auto", "flash", "sdpa"] = option(
        "auto", "the kernel: FlashAttention-4 or PyTorch; auto: the fastest that runs here"
    )
    eval_iters: int = option(1, "batches of a validation", ge=1)
    eval_interval: int = option(100, "steps between validations", ge=1)
    eval_batch_size: int = option(1, "samples of a validation batch", ge=1)
    valid_prompts: Texts = option([], "prompts of validation videos; default: from valid_data")
    valid_videos: int = option(1, "videos from captions of valid_data in each validation", ge=0)
    only_log_video_latents: bool = option(False, "keep validation videos as latents, undecoded")
    save: str = option("ckpts", "folder for the runs' folders", min_length=1)
    save_interval: int = option(100, "steps between checkpoints", ge=1)
    save_total_limit: int = option(0, "keep this many of the newest checkpoints; 0: all", ge=0)
    log_interval: int = option(20, "steps between lines of the log", ge=1)
    wandb: bool = option(False, "log to Weights & Biases too")
    wandb_project_name: str = option("cogvideox", "project at Weights & Biases")
    no_load_rng: bool = option(True, "accepted from old files; a run starts from `seed`")
    local_rank: int = option(0, "set by launchers; the environment's LOCAL_RANK decides")

    @field_validator("experiment_name")
    @classmethod
    def _check_experiment_name(cls, name: str) -> str:
        if not name or "/" in name or "\0" in name or len(os.fsencode(name)) > _MAX_NAME_BYTES:
            raise ValueError(
                f"{name!r:.100} must be the name of a folder in `save`, without a slash and of at "
                f"most {_MAX_NAME_BYTES} bytes"
            )
        return name


@dataclass
class Config:
    """A checked configuration: the arguments, and the other sections as plain dicts."""

    args: Any
    model: dict[str, Any]
    data: dict[str, Any]
    deepspeed: dict[str, Any]
    files: list[str]
    allow_target: list[str]

    def place(self, section: str) -> str:
        """The place of a section in the files, for messages."""
        return f"configuration {' + '.join(self.files)}: {section}"


def _calls_resolver(text: str) -> bool:
    """Whether a value holds a call such as ``${oc.env:HOME}``; ``${args.seed}`` is not a call.

    References within references are removed from the inside out; a call, with its colon, remains.
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
            f"configuration {name}: {value!r} is not allowed, no code in YAML: environment "
            "variables are not read and functions are not called; write the value itself"
        )


def _check_containers(before: object, value: object, name: str, key: str = "") -> None:
    """Raise UserError if a file has a list where earlier files have keys, or the reverse."""
    if isinstance(before, dict) and isinstance(value, dict):
        for own in before.keys() & value.keys():
            _check_containers(before[own], value[own], name, f"{key}.{own}" if key else str(own))
    elif {type(before), type(value)} == {dict, list}:
        found, wanted = ("a list", "keys") if isinstance(value, list) else ("keys", "a list")
        at = f" at {key}" if key else ""
        raise UserError(f"configuration {name}: {found}{at}, where {wanted} should be")


def read_yaml(files: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read and merge YAML files.

    Returns:
        The four sections as plain dicts, and the last file that has each section and each key in
        it (``args``, ``args.seed`` …).

    Raises:
        UserError: a file is missing, not UTF-8, not YAML, calls a resolver or has an unknown
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
            raise UserError(f"configuration {sources[name]}: {name} must hold keys, not a value")
    return {name: sections.get(name) or {} for name in SECTIONS}, sources


def check_given(
    args_class: type[CommonArgs], given: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """Check values that Python code gives for keys of `args`, like those of a YAML file.

    Args:
        args_class: the options of one of the two commands.
        given: option → value. None is left out, so that the files decide; paths may be
            `os.PathLike`.
        where: what was called, for messages.

    Raises:
        UserError: a key is unknown, or a value has another type or range.
    """
    plain = {key: as_in_yaml(value) for key, value in given.items() if key not in IGNORED_ARGS}
    plain = {key: value for key, value in plain.items() if value is not None}
    args = checked(args_class, plain, place=lambda key: f"{where}: {key}" if key else where)
    return {key: getattr(args, key) for key in plain}


def as_in_yaml(value: Any) -> Any:  # noqa: ANN401 (values of all types)
    """A value of Python code as YAML would give it: paths as texts, NumPy's integers as int …"""
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
        files: paths, merged in this order.
        given: option → value that wins over the files: flags, for example.
        allow_target: further dotted prefixes under which the files may name classes.

    Raises:
        UserError: a file cannot be used (see `read_yaml`), a key is unknown, or a value has another
            type or range.
    """
    sections, sources = read_yaml(files)

    def place(key: str) -> str:
        if not key:
            return ""  # a mistake of several options, which the sentence names
        if key in given:
            return f"--{key.replace('_', '-')}"
        # A reference to another section may stand in the place of args.
        return f"configuration {sources.get(f'args.{key}', sources['args'])}: args.{key}"

    known = {**SamplingArgs.model_fields, **TrainingArgs.model_fields, **IGNORED_ARGS}
    for key in sections["args"]:
        check_known([key], known, where=f"args of {sources.get(f'args.{key}', sources['args'])}")
    own = {key: value for key, value in sections["args"].items() if key in args_class.model_fields}
    values = {key: value for key, value in own.items() if value is not None}  # blank: the default
    if given.get("fp16") or given.get("bf16"):  # replaces the file's precision
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
