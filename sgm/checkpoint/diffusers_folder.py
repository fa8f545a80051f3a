"""Folders in diffusers' layout: where a part is, and its tensors, each read when asked for.

A pipeline's folder has ``model_index.json`` and a folder for each part; a part's folder has
``config.json`` and its weights, in one file or in shards that an index lists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from sgm.checkpoint.reading import (
    check_kind,
    check_weight_file,
    read_checkpoint,
    tensors_of,
    whole_safetensors,
)
from sgm.checkpoint.tensors import LazyTensors, on_meta
from sgm.errors import UserError

DiffusersPart = Literal["transformer", "vae"]

PART_CLASSES: Mapping[DiffusersPart, str] = {
    "transformer": "CogVideoXTransformer3DModel",
    "vae": "AutoencoderKLCogVideoX",
}
_PIPELINES = "CogVideoX"  # how the names of the pipelines that share these parts begin
_WEIGHTS = "diffusion_pytorch_model"
_VARIANTS = ("", ".fp32", ".fp16", ".bf16")  # the first that is there is read

# What shapes do not show: key of config.json → its value in the 2B model, which is also what an
# absent key means, and what another value says of the model.
_OTHER_CONTEXT = "the image-to-video models"
_SETTINGS: Mapping[DiffusersPart, Mapping[str, tuple[Any, str]]] = {
    "transformer": {
        "use_rotary_positional_embeddings": (False, "CogVideoX-5B and CogVideoX1.5"),
        "patch_size_t": (None, "CogVideoX1.5"),
        "ofs_embed_dim": (None, _OTHER_CONTEXT),
        "use_learned_positional_embeddings": (False, _OTHER_CONTEXT),
        "activation_fn": ("gelu-approximate", "another model"),
        "timestep_activation_fn": ("silu", "another model"),
        "flip_sin_to_cos": (True, "another model"),
        "freq_shift": (0, "another model"),
        "norm_eps": (1e-5, "another model"),
        "temporal_interpolation_scale": (1.0, "another model"),
    },
    "vae": {
        "act_fn": ("silu", "another model"),
        "norm_eps": (1e-6, "another model"),
        "norm_num_groups": (32, "another model"),
        "shift_factor": (None, "another model"),
        "latents_mean": (None, "another model"),
        "latents_std": (None, "another model"),
    },
}

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LARGEST_JSON = 1 << 26  # bytes; the index of a large model has some 100 kB
_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is absent, or is something else.
    """
    check_kind(path)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not UTF-8 and not JSON are ValueErrors
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is damaged: it is not an object in JSON; copy it from the original again"
        )
    return found


def _quoted(value: object) -> str:
    return repr(value)[:_LONGEST_QUOTE]


def is_pipeline(folder: Path) -> bool:
    """Whether `folder` is that of a diffusers pipeline.

    Raises:
        UserError: it is another model's pipeline, or its index is damaged.
    """
    index = folder / "model_index.json"
    if not os.path.isfile(index):
        return False
    pipeline = read_json(index).get("_class_name")
    if not (isinstance(pipeline, str) and pipeline.startswith(_PIPELINES)):
        raise UserError(
            f"{folder} is the diffusers folder of another pipeline ({_quoted(pipeline)}); needed "
            "is that of a CogVideoXPipeline, CogVideoX-2B's"
        )
    return True


def find_in_pipeline(folder: Path, part: str) -> Path | None:
    """The folder of a part in a diffusers pipeline's `folder`; None where that is no pipeline.

    Raises:
        UserError: as `is_pipeline`, or it lacks the part.
    """
    if not is_pipeline(folder):
        return None
    if not (folder / part).is_dir():
        raise UserError(f"the diffusers folder {folder} lacks the folder {part}; copy it whole")
    return folder / part


def find_diffusers_part(path: str | Path, part: DiffusersPart) -> Path | None:
    """The folder of a part, where `path` is a diffusers folder; None where it is none.

    Args:
        path: a pipeline's folder, or the part's own.
        part: the folder's name in a pipeline.

    Raises:
        UserError: it is another model's pipeline, lacks the part, or its JSON is damaged.
    """
    folder = Path(os.path.expanduser(path))
    config = folder / "config.json"
    if found := find_in_pipeline(folder, part):
        return found
    return folder if os.path.isfile(config) and "_class_name" in read_json(config) else None


def _check_config(config: Mapping[str, Any], folder: Path, part: DiffusersPart) -> None:
    """Refuse another class and another kind of model, which names and shapes may not show."""
    name = config.get("_class_name")
    if name != PART_CLASSES[part]:
        raise UserError(
            f"{folder} holds a diffusers {_quoted(name)}, and needed is the {part} of "
            f"CogVideoX-2B, a {PART_CLASSES[part]}; name its folder or the whole pipeline's"
        )
    for key, (expected, others) in _SETTINGS[part].items():
        value = config.get(key, expected)
        if value != expected:
            raise UserError(
                f"{folder} is not the {part} of CogVideoX-2B: its config.json has {key}="
                f"{_quoted(value)}, as {others}; only 2B ({key}={expected}) runs here"
            )


def _find_weights(folder: Path) -> Path:
    """The index of a folder's shards, or its one file of weights.

    Raises:
        UserError: there is neither.
    """
    for kind in ("safetensors", "bin"):
        for variant in _VARIANTS:
            for name in (
                f"{_WEIGHTS}.{kind}.index{variant}.json",
                f"{_WEIGHTS}{variant}.{kind}.index.json",
                f"{_WEIGHTS}{variant}.{kind}",
            ):
                if (folder / name).is_file():
                    return folder / name
    raise UserError(
        f"the diffusers folder {folder} holds no weights: {_WEIGHTS}.safetensors, or its shards "
        "with their index.json; copy it whole (in a git clone run 'git lfs pull')"
    )


def _read_index(index: Path) -> dict[str, Path]:
    """Name → file of the tensors that an index lists; every file is there.

    Raises:
        UserError: the index is damaged or names a file elsewhere, or a shard is absent.
    """
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise UserError(
            f"{index} is damaged: it has no weight_map; copy it from the original again"
        )
    for name in set(map(str, weight_map.values())):
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise UserError(
                f"{index} names {_quoted(name)}, which is no file of its own folder; copy it from "
                "the original again"
            )
        if not os.path.isfile(index.with_name(name)):
            raise UserError(
                f"the diffusers folder {index.parent} lacks the shard {name[:_LONGEST_QUOTE]} that "
                f"{index.name} names; copy it there from the original"
            )
    return {tensor: index.with_name(str(name)) for tensor, name in weight_map.items()}


def diffusers_files(folder: Path) -> list[Path]:
    """The files that the tensors of a part's folder come from, sorted: one, or index and shards.

    Raises:
        UserError: there are none, or a shard is absent.
    """
    path = _find_weights(folder)
    return [path, *sorted(set(_read_index(path).values()))] if path.suffix == ".json" else [path]


def _read_tensor(path: Path, name: str) -> Tensor:
    # Opened anew each time, so that the pages of what was read before are given back.
    with whole_safetensors(path), safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _lazy(path: Path) -> tuple[Mapping[str, Callable[[], Tensor]], Mapping[str, Tensor]]:
    """How to read each tensor of a file, and the same on the meta device."""
    check_weight_file(path)
    if path.suffix != ".safetensors":
        tensors = tensors_of(read_checkpoint(path), path, wrapper="state_dict")
        return {name: partial(tensors.__getitem__, name) for name in tensors}, on_meta(tensors)
    shapes = {}
    with whole_safetensors(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{path}: {name} is stored as {entry.get_dtype()}; quantised weights are not "
                    "read, take the original ones (float32, float16 or bfloat16)"
                )
            dtype = _DTYPES[entry.get_dtype()]
            shapes[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    if not shapes:
        raise UserError(f"{path} holds no tensors; copy it from the original again")
    return {name: partial(_read_tensor, path, name) for name in shapes}, shapes


def _refuse_unmerged(names: Iterable[str], folder: Path) -> None:
    name = next((name for name in names if ".base_layer." in name or ".lora_A." in name), None)
    if name:
        raise UserError(
            f"{folder} still holds the LoRA beside the weights ({name[:_LONGEST_QUOTE]}); call "
            "unload_lora_weights() after fuse_lora() and save again"
        )


def read_diffusers_part(
    folder: Path, part: DiffusersPart
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """The configuration of a part, and its tensors under diffusers' names, read when asked for.

    Args:
        folder: as `find_diffusers_part` gives it.
        part: what must be in it.

    Returns:
        ``config.json``, and a mapping that opens a safetensors file anew at each access, so that no
        more is mapped than what the caller keeps. Heads are read and checked at once.

    Raises:
        UserError: the folder is of another class or model, or a file is absent or damaged.
    """
    config = read_json(folder / "config.json")
    _check_config(config, folder, part)
    path = _find_weights(folder)
    if path.suffix != ".json":
        makers, shapes = _lazy(path)
        _refuse_unmerged(shapes, folder)
        return config, LazyTensors(makers, meta=lambda: shapes)
    weight_map = _read_index(path)
    _refuse_unmerged(weight_map, folder)
    files = {file: _lazy(file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file][1]:
            raise UserError(
                f"{path} is damaged: by it, {name} is in {file.name}, which does not hold it; copy "
                "both from the original again"
            )
    makers = {name: files[file][0][name] for name, file in weight_map.items()}
    shapes = {name: files[file][1][name] for name, file in weight_map.items()}
    return config, LazyTensors(makers, meta=lambda: shapes)
