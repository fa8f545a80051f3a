"""The options of both commands and the YAML files they come from: one checked configuration.

``--base a.yaml b.yaml`` are merged in this order; a flag wins over the files. Every key of `args`
is a field of `SamplingArgs` or `TrainingArgs`, so these two dataclasses are the reference for
both. Nothing heavy is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse as parse_interpolation
from yaml import YAMLError

from sgm.errors import UserError, nearest_name
from sgm.util import is_finite_number

if TYPE_CHECKING:
    from sgm.checkpoint.find import Weights

_KEYS = ("path", "scale")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA to merge.

    Args:
        path: a run's folder, a checkpoint's or a file; see `sgm.checkpoint.read_lora`. In a run,
            what `find_lora` found there.
        scale: strength; 1 is as trained, 0 nothing, below 0 the opposite.
    """

    path: str | Weights
    scale: float = 1.0


def lora_from_text(text: str) -> LoraChoice:
    """``PATH`` or ``PATH:SCALE``; where a path of the whole text exists, it is meant.

    Raises:
        UserError: the scale is not finite, or no number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or not path or os.path.exists(os.path.expanduser(text)):
        return LoraChoice(text)
    try:
        scale = float(number)
    except ValueError:
        if os.path.exists(os.path.expanduser(path)):
            raise UserError(
                f"--lora {text}: {colon + number!r} is no number; write the strength after the "
                "colon, as in PATH:0.8"
            ) from None
        return LoraChoice(text)  # a colon of the path itself
    return LoraChoice(path, _checked_scale(scale, where=text))


def loras_from_yaml(value: Any) -> list[LoraChoice]:
    """The value of ``lora:``, a path or ``{path, scale}``, or a list of these.

    Raises:
        UserError: it is something else; the sentence says what, not in which file.
    """
    items = value if isinstance(value, list) else [value]
    return [_from_item(item) for item in items]


def _from_item(item: Any) -> LoraChoice:
    if isinstance(item, str) and item:
        return lora_from_text(item)
    if not isinstance(item, Mapping):
        raise UserError(
            f"{item!r} is not a LoRA: write a path, or {{path: …, scale: …}}, or a list of these"
        )
    for key in item:
        if key not in _KEYS:
            raise UserError(f"unknown key {str(key)!r} in {dict(item)}; {nearest_name(key, _KEYS)}")
    path = item.get("path")
    if not isinstance(path, str) or not path:
        raise UserError(f"{dict(item)} has no path; it must name the LoRA's folder or file")
    return LoraChoice(path, _checked_scale(item.get("scale", 1.0), where=path))


def _checked_scale(value: Any, *, where: str) -> float:
    if not is_finite_number(value):
        raise UserError(
            f"scale {value!r} of {where} must be a finite number; 1 is the LoRA as trained"
        )
    return float(value)


# What the loader raises: ValueError for text that is not UTF-8 or a number that is none,
# RecursionError for a list within itself.
_YAML_ERRORS = (YAMLError, ValueError, RecursionError)

SECTIONS = ("args", "model", "data", "deepspeed")

# Keys of `args` that published files carry and nothing here needs, with the reason.
IGNORED_ARGS = {
    "force_inference": "weights with real gaps are always an error, expected absences never are",
    "force_train": "as force_inference",
}


def _option(default: Any, help_text: str) -> Any:
    factory = (lambda: list(default)) if isinstance(default, list) else dataclasses.MISSING
    plain = dataclasses.MISSING if isinstance(default, list) else default
    return field(default=plain, default_factory=factory, metadata={"help": help_text})


@dataclass
class CommonArgs:
    """What sampling and training both read."""

    mode: Literal["inference", "finetune", "pretrain"] = _option(
        "inference", "what the file is for; a training run starts from `load` in 'finetune'"
    )
    load: str | None = _option(
        None, "the transformer's weights: a folder of SAT or diffusers, a file"
    )
    seed: int = _option(42, "seed of all random numbers")
    fp16: bool = _option(False, "run in float16")
    bf16: bool = _option(False, "run in bfloat16")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto: a GPU where there is one")
    model_parallel_size: int = _option(1, "kept for old files; only 1 is supported")

    @property
    def precision(self) -> str:
        """The name that PyTorch has for the precision of the run."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


@dataclass
class SamplingArgs(CommonArgs):
    """Arguments of sample_video.py."""

    batch_size: int = _option(1, "videos for each prompt")
    input_type: Literal["txt", "cli"] = _option("txt", "prompts from input_file, or typed")
    input_file: str = _option("configs/test.txt", "prompts, UTF-8, one on a line")
    negative_prompt: str = _option("", "what the videos should not show; empty: unconditional")
    latent_channels: int = _option(16, "channels of the latents, as the model was built")
    sampling_num_frames: int = _option(13, "latent frames: n gives 4·(n − 1) + 1 video frames")
    sampling_image_size: list[int] = _option([480, 720], "height and width of the video in pixels")
    sampling_fps: int = _option(8, "frames per second of the mp4")
    parallel: Literal["prompts", "video"] = _option(
        "prompts", "what several processes divide: the prompts, or the work on each video"
    )
    step_cache: float = _option(
        0.0, "reuse steps that change less than this share: faster, not the same; 0: off, try 0.1"
    )
    tile_decode: bool = _option(
        False, "decode in overlapping tiles: a quarter of the memory at 480x720, not the same video"
    )
    memory: Literal["auto", "high", "low"] = _option(
        "auto", "high: all weights on the GPU; low: each part while it works; auto: as it fits"
    )
    compile: bool | None = _option(
        None, "compile the transformer's blocks; default: on a GPU, from 100 steps on"
    )
    attention: Literal["auto", "hopper", "flash", "sdpa"] = _option(
        "auto",
        "what computes attention: this project's kernel for Hopper GPUs, FlashAttention-4 or "
        "PyTorch; auto: the fastest that runs here",
    )
    fp8: bool = _option(
        False, "the blocks' MLPs in float8: faster where the GPU has it, not the same video"
    )
    output_dir: str = _option("outputs", "folder for the videos")
    lora: list[LoraChoice] = _option(
        [], "LoRAs merged into the weights: folders or files, PATH:0.8 for another strength than 1"
    )


@dataclass
class TrainingArgs(CommonArgs):
    """Arguments of train_video.py."""

    experiment_name: str = _option("finetune", "the run's folder is this and the time of start")
    resume: str | None = _option(None, "go on with a run: latest, or the folder of one")
    train_data: list[str] = _option([], "folders (or files) of training data")
    valid_data: list[str] = _option([], "folders (or files) of validation data")
    split: str = _option("1,0,0", "kept for old files; train_data and valid_data decide")
    cache_dir: str | None = _option(None, "keep latents and text embeddings in this folder")
    num_workers: int = _option(8, "worker processes that load data")
    text_device: Literal["auto", "cpu"] = _option("auto", "where the text encoder runs")
    train_iters: int = _option(1000, "optimizer steps")
    lr_decay_style: Literal["constant", "linear", "cosine"] = _option("linear", "after the warm-up")
    lr_decay_iters: int | None = _option(None, "steps of the decay; default: train_iters")
    lr_decay_ratio: float = _option(0.1, "cosine ends at this share of the learning rate")
    warmup: float = _option(0.01, "share of the decay's steps in which the learning rate rises")
    auto_warmup_steps: int = _option(100, "first steps, which take 5% of the learning rate at most")
    ema_decay: float = _option(0.0, "keep a moving average of the weights; 0: none, usual: 0.9999")
    nonfinite_limit: int = _option(10, "stop after so many steps in a row without a finite loss")
    checkpoint_activations: bool = _option(False, "recompute activations to save memory")
    checkpoint_keep: Literal["block", "attention"] = _option(
        "block", "kept of each block: its input, or the attention's output too (faster)"
    )
    compile: bool | None = _option(None, "compile the blocks; default: on a GPU, from 300 steps on")
    attention: Literal["auto", "flash", "sdpa"] = _option(
        "auto",
        "what computes attention: FlashAttention-4 or PyTorch; auto: the fastest that runs here",
    )
    eval_iters: int = _option(1, "batches in a validation")
    eval_interval: int = _option(100, "steps between validations")
    eval_batch_size: int = _option(1, "samples in a validation batch")
    valid_prompts: list[str] = _option([], "make videos of these; default: captions of valid_data")
    valid_videos: int = _option(1, "videos from captions of valid_data in each validation")
    only_log_video_latents: bool = _option(False, "keep the videos' latents, do not decode them")
    save: str = _option("ckpts", "folder for the runs' folders")
    save_interval: int = _option(100, "steps between checkpoints")
    save_total_limit: int = _option(0, "keep the newest checkpoints only; 0: all")
    log_interval: int = _option(20, "steps between lines of the log")
    wandb: bool = _option(False, "log to Weights & Biases too")
    wandb_project_name: str = _option("cogvideox", "its project")
    no_load_rng: bool = _option(True, "kept for old files; a run starts from `seed`")
    local_rank: int = _option(0, "set by launchers; the environment's LOCAL_RANK is what counts")


@dataclass
class Config:
    """A checked command line: the arguments and the sections of the YAML files as plain dicts."""

    args: Any
    model: dict[str, Any]
    data: dict[str, Any]
    deepspeed: dict[str, Any]
    files: list[str]
    allow_target: list[str]

    def place(self, section: str) -> str:
        """Where a section stands, for messages."""
        return f"configuration {' + '.join(self.files)}: {section}"


def value_type(annotation: Any) -> tuple[type, tuple[Any, ...], bool]:
    """Element type, allowed choices and whether it is a list, of a field's annotation."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return str, typing.get_args(annotation), False
    if origin is list:
        return typing.get_args(annotation)[0], (), True
    if origin in (typing.Union, types.UnionType):  # str | None
        return typing.get_args(annotation)[0], (), False
    return annotation, (), False


def _calls_resolver(text: str) -> bool:
    """Whether a value holds a call such as ``${oc.env:HOME}``; ``${args.seed}`` is none."""
    if "${" not in text:
        return False
    nodes = [parse_interpolation(text)]
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "InterpolationResolverContext":
            return True
        nodes.extend(getattr(node, "children", None) or ())
    return False


def _check_no_resolvers(value: Any, name: str) -> None:
    """Refuse resolvers anywhere in what the file `name` holds: a file is to hold values only.

    Raises:
        UserError: there is one.
    """
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_no_resolvers(item, name)
    elif isinstance(value, str) and _calls_resolver(value):
        raise UserError(
            f"configuration {name}: {value!r} is not allowed, no code in YAML: environment "
            "variables are not read and no functions called; write the value itself"
        )


def _check_containers(before: Any, value: Any, name: str, key: str = "") -> None:
    """Refuse a list of the file `name` where the files before it have keys, or the other way round.

    Raises:
        UserError: there is one; says at which key.
    """
    kinds = [type(one) for one in (before, value)]
    if kinds == [dict, dict]:
        for own in before.keys() & value.keys():
            _check_containers(before[own], value[own], name, f"{key}.{own}" if key else str(own))
    elif set(kinds) == {dict, list}:
        found, wanted = ("a list", "keys") if kinds[1] is list else ("keys", "a list")
        at = f" at {key}" if key else ""
        raise UserError(f"configuration {name}: {found}{at}, where {wanted} should be")


def read_yaml(files: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged YAML files as a plain dict with the four sections, and where things come from.

    Returns:
        The sections; and for each section and each key in it (``args``, ``args.seed`` …) the last
        file that has it.

    Raises:
        UserError: a file is absent, not UTF-8, not YAML, calls resolvers or has an unknown
            section.
    """
    merged = OmegaConf.create({})
    sources: dict[str, str] = {}
    for name in files:
        if not Path(name).is_file():
            place = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
            raise UserError(f"configuration {name}: no such file{place}; check its path")
        try:
            loaded = OmegaConf.load(name)
            plain = OmegaConf.to_container(loaded, resolve=False)
            _check_no_resolvers(plain, name)
            _check_containers(OmegaConf.to_container(merged, resolve=False), plain, name)
            for key in plain:
                if key not in SECTIONS:
                    raise UserError(
                        f"configuration {name}: unknown section {str(key)!r}; "
                        f"{nearest_name(str(key), SECTIONS)}"
                    )
                keys = plain[key] if isinstance(plain[key], dict) else ()
                sources |= dict.fromkeys([key, *(f"{key}.{own}" for own in keys)], name)
            merged = OmegaConf.merge(merged, loaded)
        except (*_YAML_ERRORS, OmegaConfBaseException, TypeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"configuration {name} is not valid YAML: {reason}") from None
    try:
        sections = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = ".".join(str(getattr(error, "full_key", "") or "").split(".")[:2])
        place = sources.get(key, " + ".join(files))
        raise UserError(f"configuration {place}: {str(error).splitlines()[0]}") from None
    for name in SECTIONS:
        if not isinstance(sections.get(name) or {}, dict):
            raise UserError(f"configuration {sources[name]}: {name} must hold keys, not a value")
    return {name: sections.get(name) or {} for name in SECTIONS}, sources


_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def checked_value(value: Any, annotation: Any, *, where: str) -> Any:
    """`value` as the type of its field in `args`; `where` says in messages what gave it.

    Raises:
        UserError: it is of another type or not among the choices.
    """
    kind, choices, is_list = value_type(annotation)
    if kind is LoraChoice:
        try:
            return loras_from_yaml(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    values = value if is_list and isinstance(value, list) else [value]
    # bool is an int in Python, but true is no number here.
    for one in values:
        allowed = (int, float) if kind is float else kind
        wrong_type = not isinstance(one, allowed) or (isinstance(one, bool) and kind is not bool)
        if wrong_type or (choices and one not in choices):
            expected = " or ".join(map(repr, choices)) or _TYPE_NAMES[kind]
            raise UserError(f"{where}: {one!r} is not {expected}; change it there")
    return values if is_list else value


def check_given(
    args_class: type[CommonArgs], given: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """Values that Python code gives for keys of `args`, checked like those of a YAML file.

    Args:
        args_class: which of the two commands they are for.
        given: None is left out, so that the files decide; paths may be `os.PathLike`.
        where: what was called, for messages.

    Raises:
        UserError: a key is unknown, or a value is of another type.
    """
    hints = typing.get_type_hints(args_class)
    checked = {}
    for name, value in given.items():
        if name not in hints and name not in IGNORED_ARGS:
            raise UserError(f"{where}: unknown argument {name!r}; {nearest_name(name, hints)}")
        if name in hints and value is not None:
            place = f"{where}: {name}"
            checked[name] = checked_value(_as_in_yaml(value), hints[name], where=place)
    return checked


def _as_in_yaml(value: Any) -> Any:
    """A value of Python code as YAML would give it: paths as texts, tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_as_in_yaml(item) for item in value] if isinstance(value, list | tuple) else value


def load_config(
    args_class: type[CommonArgs],
    files: Sequence[str],
    given: Mapping[str, Any],
    *,
    allow_target: Sequence[str] = (),
) -> Config:
    """Read and check the YAML files of a run.

    Args:
        args_class: which of the two commands the section `args` is read for.
        files: paths, merged in this order.
        given: values of `args` that win over the files, of their fields' types; flags, for example.
        allow_target: further dotted prefixes under which the files may name classes.

    Raises:
        UserError: a file is wrong: see `read_yaml` and `checked_value`; or a key is unknown.
    """
    sections, sources = read_yaml(files)
    hints = typing.get_type_hints(args_class)
    known = set(typing.get_type_hints(SamplingArgs)) | set(typing.get_type_hints(TrainingArgs))
    values = {}
    for name, value in sections["args"].items():
        file = sources.get(f"args.{name}", sources["args"])  # args may stand for another section
        if name not in known | set(IGNORED_ARGS):
            hint = nearest_name(str(name), known)
            raise UserError(f"unknown key {str(name)!r} in args of {file}; {hint}")
        if name in hints and value is not None:  # a blank value means the default
            values[name] = checked_value(
                value, hints[name], where=f"configuration {file}: args.{name}"
            )
    # A precision asked for on the command line replaces the file's.
    if given.get("fp16") or given.get("bf16"):
        values |= {"fp16": False, "bf16": False}
    values |= {name: value for name, value in given.items() if name in hints}
    args = args_class(**values)
    if args.fp16 and args.bf16:
        raise UserError("fp16 and bf16 are both set; keep one of them")
    if args.model_parallel_size != 1:
        raise UserError("model_parallel_size must be 1: splitting one model is not supported")
    return Config(
        args=args,
        model=sections["model"],
        data=sections["data"],
        deepspeed=sections["deepspeed"],
        files=[str(file) for file in files],
        allow_target=list(allow_target),
    )
