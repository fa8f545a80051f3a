"""Folders in diffusers' layout: finding a part, and its tensors, each read on access.

PyTorch is imported only where tensors are read.

A pipeline's folder has ``model_index.json`` and a folder for each part; a part's folder has
``config.json`` and its weights, in one file or in shards that an index lists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sgm.checkpoint.weight_file import (
    LONGEST_QUOTE,
    WeightFile,
    Weights,
    damaged,
    incomplete,
    read_json,
)
from sgm.errors import UserError
from sgm.files import expanded

if TYPE_CHECKING:
    from torch import Tensor

DiffusersPart = Literal["transformer", "vae"]

PART_CLASSES: Mapping[DiffusersPart, str] = {
    "transformer": "CogVideoXTransformer3DModel",
    "vae": "AutoencoderKLCogVideoX",
}
_PIPELINES = "CogVideoX"  # the beginning of the names of the pipelines that share these parts
_WEIGHTS = "diffusion_pytorch_model"
_VARIANTS = ("", ".fp32", ".fp16", ".bf16")  # in the order of preference

# Settings that shapes do not show: key of config.json → its value in the 2B model, which is also
# the value of a missing key, and the models that have another value.
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


def _quoted(value: object) -> str:
    return repr(value)[:LONGEST_QUOTE]


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
            f"{folder} is the diffusers folder of another pipeline ({_quoted(pipeline)}); it must "
            "be that of a CogVideoXPipeline, CogVideoX-2B's"
        )
    return True


def find_in_pipeline(folder: Path, part: str) -> Path | None:
    """The folder of a part in a diffusers pipeline's `folder`; None if that is not a pipeline.

    Raises:
        UserError: as in `is_pipeline`, or the part is missing.
    """
    if not is_pipeline(folder):
        return None
    if not (folder / part).is_dir():
        raise incomplete(f"the diffusers folder {folder}", f"the folder {part}")
    return folder / part


def find_diffusers_part(path: str | Path, part: DiffusersPart) -> Weights | None:
    """The part, if `path` is a diffusers folder; otherwise None.

    Args:
        path: a pipeline's folder, or the part's own.
        part: the folder's name in a pipeline.

    Raises:
        UserError: it is another model's pipeline or part, the part or a file of it is missing, or
            its JSON is damaged.
    """
    folder = expanded(path)
    if found := find_in_pipeline(folder, part):
        return find_part(found, part)
    if not os.path.isfile(folder / "config.json"):
        return None
    return find_part(folder, part) if "_class_name" in read_json(folder / "config.json") else None


def find_part(folder: Path, part: DiffusersPart) -> Weights:
    """The part whose own `folder` this is.

    Args:
        folder: the folder of ``config.json`` and the weights.
        part: the folder's name in a pipeline.

    Raises:
        UserError: as in `find_diffusers_part`.
    """
    config = read_json(folder / "config.json")
    _check_config(config, folder, part)
    path = _find_weights(folder)
    if path.suffix != ".json":
        return Weights(folder, part, folder, (WeightFile(path),), config=config)
    files = map(WeightFile, find_shards(path, f"the diffusers folder {folder}"))
    return Weights(folder, part, folder, tuple(files), (path,), config)


def _check_config(config: Mapping[str, Any], folder: Path, part: DiffusersPart) -> None:
    """Raise UserError for another class or model; names and shapes may not show the difference."""
    name = config.get("_class_name")
    if name != PART_CLASSES[part]:
        raise UserError(
            f"{folder} holds a diffusers {_quoted(name)}, but the {part} of CogVideoX-2B is a "
            f"{PART_CLASSES[part]}; name its folder or the whole pipeline's"
        )
    for key, (expected, others) in _SETTINGS[part].items():
        value = config.get(key, expected)
        if value != expected:
            raise UserError(
                f"{folder} is not the {part} of CogVideoX-2B: its config.json has {key}="
                f"{_quoted(value)}, as {others}; only 2B ({key}={expected}) runs here"
            )


def _find_weights(folder: Path) -> Path:
    """The index of a folder's shards, or its one file of weights."""
    for kind in ("safetensors", "bin"):
        for variant in _VARIANTS:
            for name in (
                f"{_WEIGHTS}.{kind}.index{variant}.json",
                f"{_WEIGHTS}{variant}.{kind}.index.json",
                f"{_WEIGHTS}{variant}.{kind}",
            ):
                if (folder / name).is_file():
                    return folder / name
    names = f"weights ({_WEIGHTS}.safetensors, or its shards with their index.json)"
    raise incomplete(f"the diffusers folder {folder}", names)


def find_shards(index: Path, folder: str) -> list[Path]:
    """The shards that an index lists, in the order of their names.

    Args:
        index: the JSON file; the shards lie in the same folder.
        folder: what messages call the folder.

    Raises:
        UserError: the index is damaged or names a file elsewhere, or a shard is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise damaged(index, "is damaged: it has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise damaged(index, f"names {_quoted(name)}, which is not a file of its own folder")
        if not os.path.isfile(index.with_name(name)):
            shard = name[:LONGEST_QUOTE]
            raise incomplete(folder, f"the shard {shard} that {index.name} names")
    return [index.with_name(name) for name in names]


def read_diffusers_part(part: Weights) -> Mapping[str, Tensor]:
    """The tensors of a part under diffusers' names, each read on access.

    The headers of the files are read and checked at once.

    Raises:
        UserError: a file is damaged, or a LoRA is still beside the weights.
    """
    from sgm.checkpoint.tensors import LazyTensors, on_meta

    files = [file.tensors(lazily=True) for file in part.files]
    makers = {name: partial(tensors.__getitem__, name) for tensors in files for name in tensors}
    for name in makers:
        if ".base_layer." in name or ".lora_A." in name:
            raise UserError(
                f"{part.path} still holds the LoRA beside the weights ({name[:LONGEST_QUOTE]}); "
                "call unload_lora_weights() after fuse_lora() and save again"
            )
    meta = {name: tensor for tensors in files for name, tensor in on_meta(tensors).items()}
    return LazyTensors(dict(sorted(makers.items())), meta=meta)
