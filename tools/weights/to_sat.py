"""From a diffusers folder to the parts of a model in SAT's layout: read, check, write."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.diffusers_folder import (
    PART_CLASSES,
    find_part,
    is_pipeline,
    read_diffusers_part,
)
from sgm.checkpoint.find import SAT_FILE, T5Files, find_foreign_file, find_t5
from sgm.checkpoint.lora_formats import is_foreign
from sgm.checkpoint.reading import read_checkpoint
from sgm.checkpoint.table import to_sat
from sgm.checkpoint.tensors import in_dtype
from sgm.checkpoint.text_encoder import check_t5
from sgm.checkpoint.weight_file import Weights, read_json
from sgm.errors import UserError
from sgm.files import write_torch
from tools.weights.sizes import check_part
from tools.weights.writing import (
    copy_text_encoder,
    copy_tokenizer_files,
    own_storage,
    save_sat_transformer,
)

logger = logging.getLogger(__name__)


T5_FOLDER = "t5-v1_1-xxl"  # as in the published layout


def _find_parts(source: Path) -> dict[str, Weights]:
    """Part → its folder, for the parts that the input has.

    Raises:
        UserError: the input is not a diffusers folder of CogVideoX-2B.
    """
    if is_pipeline(source):
        folders = {part: source / part for part in PART_CLASSES if (source / part).is_dir()}
    elif (source / "config.json").is_file():
        name = read_json(source / "config.json").get("_class_name")
        part = "vae" if name == PART_CLASSES["vae"] else "transformer"
        folders = {part: source}  # `find_part` raises UserError if it is neither
    else:
        folders = {}
    if not folders:
        raise UserError(f"{source} is {_other_kind(source)}")
    return {part: find_part(folder, part) for part, folder in folders.items()}


def _other_kind(source: Path) -> str:
    """What an input without a part of diffusers is, and what to do, for the end of a message."""
    is_file = source.is_file() and source.suffix == ".safetensors"
    if find_foreign_file(source) or (is_file and is_foreign(read_checkpoint(source))):
        return (
            "a LoRA, which --lora accepts as it is; for a file in SAT's layout: python "
            f"tools/import_lora.py --lora_path {quote(str(source))} --output_path DIR"
        )
    if is_file and (source.parent / "config.json").is_file():
        return f"one file of a folder; --input_path must name {source.parent}"
    return (
        f"{'no diffusers folder' if source.is_dir() else 'not a folder'}; --input_path must name "
        "a local diffusers folder of CogVideoX-2B, with model_index.json and the folder "
        f"{' or '.join(PART_CLASSES)} in it, or with config.json (weights in SAT's layout need no "
        "conversion)"
    )


class SatConverter:
    """Reads and checks the parts of a diffusers folder, then writes them in SAT's layout.

    Args:
        source: the folder.
        dtype: of the transformer; None keeps its own.

    Raises:
        UserError: a part is missing, damaged or of another model.
    """

    def __init__(self, source: Path, *, dtype: torch.dtype | None = None) -> None:
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        self.sizes: dict[str, dict[str, Any]] = {}
        try:
            parts = _find_parts(source)
        except OSError as error:  # such as the folder of another user
            reason = f"cannot be looked up ({error.strerror}); check the path and its permissions"
            raise UserError(f"--input_path: {source} {reason}") from None
        for part, found in parts.items():
            tensors = to_sat(read_diffusers_part(found), part, where=found.path)
            self.sizes[part] = check_part(
                tensors,
                part,
                where=found.path,
                described_by="its config.json",
                expected=found.config,
                hint="copy the folder from the original again",
            )
            own_dtype = dtype if part == "transformer" else None
            self._tensors[part] = in_dtype(tensors, own_dtype, where=found.path)
        self.text_encoder: T5Files | None = None
        if (source / "text_encoder").is_dir():
            self.text_encoder = find_t5(source, option="--input_path")
            check_t5(self.text_encoder, dtype=torch.float32)
            self.text_encoder.release()

    def write(self, folder: Path, *, link_text_encoder: bool) -> None:
        """Write all parts into `folder`, which is within `new_folder`."""
        if "transformer" in self._tensors:
            logger.info("writing transformer")
            save_sat_transformer(folder / "transformer", self._tensors["transformer"])
        if "vae" in self._tensors:
            logger.info("writing vae")
            state = {name: own_storage(tensor) for name, tensor in self._tensors["vae"].items()}
            (folder / "vae").mkdir()
            write_torch({"state_dict": state}, folder / "vae" / SAT_FILE)
        if self.text_encoder is not None:
            logger.info("%s text_encoder", "linking" if link_text_encoder else "copying")
            copy_text_encoder(self.text_encoder, folder / T5_FOLDER, link=link_text_encoder)
            copy_tokenizer_files(self.text_encoder, folder / T5_FOLDER)
