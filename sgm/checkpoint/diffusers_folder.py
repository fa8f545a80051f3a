"""Finds and reads the transformer and the autoencoder in folders in diffusers' layout.

A pipeline's folder has ``model_index.json`` and a folder for each part. A part's folder has
``config.json`` and its weights, in one file or in shards that an index lists.

Finding a part does not import PyTorch; only reading its tensors does.
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
_PIPELINES = "CogVideoX"  # all pipeline classes that use these parts start with this
_WEIGHTS = "diffusion_pytorch_model"
_VARIANTS = ("", ".fp32", ".fp16", ".bf16")  # in the order of preference

# Settings that cannot be seen from the tensor shapes: key of config.json → (its value in the 2B
# model, also assumed if the key is missing; the models that have another value).
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
    """Return whether `folder` is the folder of a diffusers pipeline.

    Raises:
        UserError: it is the pipeline of another model, or its index is damaged.
    """
    index = folder / "model_index.json"
    if not os.path.isfile(index):
        return False
    pipeline = read_json(index).get("_class_name")
    if not (isinstance(pipeline, str) and pipeline.startswith(_PIPELINES)):
        raise UserError(
            f"{folder} is the diffusers folder of another pipeline ({_quoted(pipeline)}); it must "
            "be a CogVideoXPipeline with CogVideoX-2B"
        )
    return True


def find_in_pipeline(folder: Path, part: str) -> Path | None:
    """Return the folder of `part` in a pipeline's `folder`; None if `folder` is not a pipeline.

    Raises:
        UserError: see `is_pipeline`; also if the part is missing.
    """
    if not is_pipeline(folder):
        return None
    if not (folder / part).is_dir():
        raise incomplete(f"the diffusers folder {folder}", f"the folder {part}")
    return folder / part


def find_diffusers_part(path: str | Path, part: DiffusersPart) -> Weights | None:
    """Return the weights of `part` if `path` is a diffusers folder; otherwise None.

    Args:
        path: the folder of a pipeline or of the part itself.
        part: the name of the part's folder in a pipeline.

    Raises:
        UserError: the pipeline or the part belongs to another model, the part or one of its files
            is missing, or a JSON file is damaged.
    """
    folder = expanded(path)
    if found := find_in_pipeline(folder, part):
        return find_part(found, part)
    if not os.path.isfile(folder / "config.json"):
        return None
    return find_part(folder, part) if "_class_name" in read_json(folder / "config.json") else None


def find_part(folder: Path, part: DiffusersPart) -> Weights:
    """Return the weights of `part` in its own `folder`.

    Args:
        folder: the folder that contains ``config.json`` and the weights.
        part: the name of the part's folder in a pipeline.

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
    """Raise UserError if the config is of another class or model.

    Another model can have the same tensor names and shapes, so these are not enough to check.
    """
    name = config.get("_class_name")
    if name != PART_CLASSES[part]:
        raise UserError(
            f"{folder} holds a diffusers {_quoted(name)}, but the {part} of CogVideoX-2B is a "
            f"{PART_CLASSES[part]}; give its folder or the folder of the whole pipeline"
        )
    for key, (expected, others) in _SETTINGS[part].items():
        value = config.get(key, expected)
        if value != expected:
            raise UserError(
                f"{folder} is not the {part} of CogVideoX-2B: its config.json has {key}="
                f"{_quoted(value)}, like {others}; only 2B ({key}={expected}) is supported"
            )


def _find_weights(folder: Path) -> Path:
    """Return the path of the shards' index in a folder, or of its single weight file."""
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
    """Return the paths of the shards that an index lists, sorted by name.

    Args:
        index: the JSON file; the shards are in the same folder.
        folder: the name of the folder in messages.

    Raises:
        UserError: the index is damaged, lists a file in another folder, or a shard is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise damaged(index, "is damaged: it has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise damaged(index, f"lists {_quoted(name)}, which is not a file in the same folder")
        if not os.path.isfile(index.with_name(name)):
            shard = name[:LONGEST_QUOTE]
            raise incomplete(folder, f"the shard {shard}, which {index.name} lists")
    return [index.with_name(name) for name in names]


def read_diffusers_part(part: Weights) -> Mapping[str, Tensor]:
    """Return the tensors of a part under diffusers' names; each is read on access.

    The headers of the files are read and checked immediately.

    Raises:
        UserError: a file is damaged, or contains LoRA matrices next to the weights.
    """
    from sgm.checkpoint.tensors import LazyTensors, on_meta

    files = [file.tensors(lazily=True) for file in part.files]
    makers = {name: partial(tensors.__getitem__, name) for tensors in files for name in tensors}
    for name in makers:
        if ".base_layer." in name or ".lora_A." in name:
            raise UserError(
                f"{part.path} still holds LoRA tensors next to the weights "
                f"({name[:LONGEST_QUOTE]}); call unload_lora_weights() after fuse_lora() and "
                "save again"
            )
    meta = {name: tensor for tensors in files for name, tensor in on_meta(tensors).items()}
    return LazyTensors(dict(sorted(makers.items())), meta=meta)
