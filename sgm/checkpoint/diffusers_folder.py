"""Folders in diffusers' layout: where a part is, and its tensors, each read when asked for.

PyTorch is imported only where tensors are read.

A pipeline's folder has ``model_index.json`` and a folder for each part; a part's folder has
``config.json`` and its weights, in one file or in shards that an index lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sgm.checkpoint.weight_file import WeightFile, read_json
from sgm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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

_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats


@dataclass(frozen=True, eq=False)
class PartFolder:
    """The folder of a part: its ``config.json``, and its files of weights, none of them read yet.

    `weight_map` is name of a tensor → file, as the `index` of shards lists them; it is empty where
    there is one file without an index.
    """

    folder: Path
    config: Mapping[str, Any]
    files: tuple[WeightFile, ...]
    index: Path | None = None
    weight_map: Mapping[str, WeightFile] = field(default_factory=dict)


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


def find_diffusers_part(path: str | Path, part: DiffusersPart) -> PartFolder | None:
    """The part, if `path` is a diffusers folder; otherwise None.

    Args:
        path: a pipeline's folder, or the part's own.
        part: the folder's name in a pipeline.

    Raises:
        UserError: it is another model's pipeline or part, lacks the part or a file of it, or its
            JSON is damaged.
    """
    folder = Path(os.path.expanduser(path))
    if found := find_in_pipeline(folder, part):
        return find_part(found, part)
    if not os.path.isfile(folder / "config.json"):
        return None
    return find_part(folder, part) if "_class_name" in read_json(folder / "config.json") else None


def find_part(folder: Path, part: DiffusersPart) -> PartFolder:
    """The part whose own `folder` this is.

    Raises:
        UserError: as in `find_diffusers_part`.
    """
    config = read_json(folder / "config.json")
    _check_config(config, folder, part)
    path = _find_weights(folder)
    if path.suffix != ".json":
        return PartFolder(folder, config, (WeightFile(path),))
    weight_map = _read_index(path)
    files = {file: WeightFile(file) for file in sorted(set(weight_map.values()))}
    return PartFolder(
        folder,
        config,
        tuple(files.values()),
        index=path,
        weight_map={name: files[file] for name, file in weight_map.items()},
    )


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


def _refuse_unmerged(names: Iterable[str], folder: Path) -> None:
    name = next((name for name in names if ".base_layer." in name or ".lora_A." in name), None)
    if name:
        raise UserError(
            f"{folder} still holds the LoRA beside the weights ({name[:_LONGEST_QUOTE]}); call "
            "unload_lora_weights() after fuse_lora() and save again"
        )


def read_diffusers_part(part: PartFolder) -> Mapping[str, Tensor]:
    """The tensors of a part under diffusers' names, each read when asked for.

    The headers of the files are read and checked at once.

    Raises:
        UserError: a file is damaged, or does not hold what the index says.
    """
    from sgm.checkpoint.tensors import LazyTensors, on_meta

    found = {file: file.tensors(wrapper="state_dict", lazily=True) for file in part.files}
    weight_map = part.weight_map or {name: file for file in part.files for name in found[file]}
    _refuse_unmerged(weight_map, part.folder)
    for name, file in weight_map.items():
        if name not in found[file]:
            raise UserError(
                f"{part.index} is damaged: by it, {name} is in {file.path.name}, which does not "
                "hold it; copy both from the original again"
            )
    makers = {name: partial(found[file].__getitem__, name) for name, file in weight_map.items()}
    shapes = {file: on_meta(tensors) for file, tensors in found.items()}
    metas = {name: shapes[file][name] for name, file in weight_map.items()}
    return LazyTensors(makers, meta=lambda: metas)
