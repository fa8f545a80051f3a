"""Convert a diffusers folder to the parts of a model in SAT's layout."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.diffusers_folder import (
    PART_CLASSES,
    DiffusersPart,
    find_part,
    is_pipeline,
    read_diffusers_part,
)
from sgm.checkpoint.find import SAT_FILE, T5Files, find_t5
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.table import to_sat
from sgm.checkpoint.tensors import in_dtype, on_meta
from sgm.checkpoint.text_encoder import check_t5
from sgm.checkpoint.weight_file import Weights, read_json
from sgm.errors import UserError
from sgm.files import write_torch
from tools.weights.sizes import check_sizes, sizes_of, weights_of
from tools.weights.writing import (
    copy_text_encoder,
    copy_tokenizer_files,
    own_storage,
    save_sat_transformer,
)

logger = logging.getLogger(__name__)


T5_FOLDER = "t5-v1_1-xxl"  # as in the published layout


def _find_parts(source: Path) -> dict[DiffusersPart, Weights]:
    """Return part → weights for the parts in `source`.

    Raises:
        UserError: `source` is not a diffusers folder of CogVideoX-2B.
    """
    folders: dict[DiffusersPart, Path] = {}
    if is_pipeline(source):
        folders = {part: source / part for part in PART_CLASSES if os.path.isdir(source / part)}
    elif os.path.isfile(source / "config.json"):
        name = read_json(source / "config.json").get("_class_name")
        # `find_part` raises UserError if the folder is of another class.
        folders = {"vae" if name == PART_CLASSES["vae"] else "transformer": source}
    if not folders:
        parts = " or ".join(PART_CLASSES)
        raise UserError(
            f"{source} is not a readable diffusers folder; --input_path must name a local "
            f"CogVideoX-2B folder that contains model_index.json and the folder {parts}, or "
            "config.json (weights in SAT's layout and LoRAs need no conversion; see 'Which weights "
            "do you have?' in README.md)"
        )
    return {part: find_part(folder, part) for part, folder in folders.items()}


class SatConverter:
    """Reads and checks the parts of a diffusers folder, then writes them in SAT's layout.

    Args:
        source: the diffusers folder.
        dtype: the dtype of the written transformer; None keeps the dtype of its file.

    Raises:
        UserError: a part is missing, damaged or of another model.
    """

    def __init__(self, source: Path, *, dtype: torch.dtype | None = None) -> None:
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        self.sizes: dict[str, dict[str, Any]] = {}
        hint = "copy the folder from the original again"
        for part, found in _find_parts(source).items():
            where = found.path
            tensors = to_sat(read_diffusers_part(found), part, where=where)
            sizes = self.sizes[part] = sizes_of(tensors, part, where)
            described_by = "its config.json"
            check_sizes(sizes, found.config, where=where, described_by=described_by, hint=hint)
            wanted = weights_of(sizes, part, where=where)
            check_fit(on_meta(tensors), wanted, path=where, hint=hint, model="a model of its sizes")
            own_dtype = dtype if part == "transformer" else None
            self._tensors[part] = in_dtype(tensors, own_dtype, where=where)
        self.text_encoder: T5Files | None = None
        if (source / "text_encoder").is_dir():
            self.text_encoder = find_t5(source, option="--input_path")
            check_t5(self.text_encoder, dtype=torch.float32)
            self.text_encoder.release()

    def write(self, folder: Path, *, link_text_encoder: bool) -> None:
        """Write all parts to `folder`, which `new_folder` has yielded."""
        if "transformer" in self._tensors:
            logger.info("writing transformer")
            save_sat_transformer(folder / "transformer", self._tensors["transformer"])
        if "vae" in self._tensors:
            logger.info("writing vae")
            state = {name: own_storage(tensor) for name, tensor in self._tensors["vae"].items()}
            (folder / "vae").mkdir()
            write_torch({"state_dict": state}, folder / "vae" / SAT_FILE)
        if self.text_encoder is not None:
            copy_text_encoder(self.text_encoder, folder / T5_FOLDER, link=link_text_encoder)
            copy_tokenizer_files(self.text_encoder, folder / T5_FOLDER)
