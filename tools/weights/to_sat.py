"""From a folder of diffusers to the parts of a model in SAT's layout: read, compared, written."""

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
from sgm.checkpoint.weight_file import read_json
from sgm.errors import UserError
from sgm.files import write_torch
from tools.weights.sizes import check_whole_part
from tools.weights.writing import (
    copy_text_encoder,
    copy_tokenizer_files,
    own_storage,
    save_sat_transformer,
)

logger = logging.getLogger(__name__)


T5_FOLDER = "t5-v1_1-xxl"  # as the user's guide lays the parts out


def _refuse_lora_and_file(source: Path) -> None:
    if any((source / name).is_file() for name in ("model_index.json", "config.json")):
        return
    is_file = source.is_file() and source.suffix == ".safetensors"
    if find_foreign_file(source) or (is_file and is_foreign(read_checkpoint(source))):
        raise UserError(
            f"{source} is a LoRA, which --lora takes as it is; for a file of SAT's layout: python "
            f"tools/import_lora.py --lora_path {quote(str(source))} --output_path DIR"
        )
    if is_file and (source.parent / "config.json").is_file():
        raise UserError(f"{source} is one file of a folder; --input_path must name {source.parent}")


def _parts_in(source: Path) -> dict[str, Path]:
    """Part → folder of what the input holds."""
    _refuse_lora_and_file(source)
    if not source.is_dir():
        raise UserError(
            f"{source} is not a folder; --input_path must name a local diffusers folder of "
            "CogVideoX-2B (with model_index.json in it)"
        )
    if (source / "model_index.json").is_file():
        found = {part: source / part for part in PART_CLASSES if (source / part).is_dir()}
        if not found:
            raise UserError(
                f"{source} has neither a folder transformer nor a folder vae; copy it whole"
            )
        is_pipeline(source)  # refuses that of another model
        return found
    if not (source / "config.json").is_file():
        raise UserError(
            f"{source} is no diffusers folder: it has neither model_index.json nor config.json; "
            "for weights in SAT's layout nothing needs converting"
        )
    name = read_json(source / "config.json").get("_class_name")
    for part, class_name in PART_CLASSES.items():
        if name == class_name:
            return {part: source}
    raise UserError(
        f"{source} holds {str(name)[:60]!r}; converted are a CogVideoXPipeline, a "
        f"{' and a '.join(PART_CLASSES.values())}"
    )


class Conversion:
    """Reads and checks the parts of a diffusers folder, then writes them.

    Args:
        source: the folder.
        dtype: of the transformer; None keeps its own.

    Raises:
        UserError: something is absent, damaged or of another model.
    """

    def __init__(self, source: Path, *, dtype: torch.dtype | None = None) -> None:
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        self.sizes: dict[str, dict[str, Any]] = {}
        try:
            parts = _parts_in(source)
        except OSError as error:  # a folder of somebody else
            raise UserError(
                f"--input_path: {source} cannot be looked up ({error.strerror}); check the path "
                "and its permissions"
            ) from None
        for part, folder in parts.items():
            found = find_part(folder, part)
            tensors = to_sat(read_diffusers_part(found), part, where=folder)
            self.sizes[part] = check_whole_part(tensors, part, found.config, where=folder)
            own_dtype = dtype if part == "transformer" else None
            self._tensors[part] = in_dtype(tensors, own_dtype, where=folder)
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
