"""Check paths and sizes of the training data in a configuration, before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgm.config import TrainingArgs
from sgm.errors import UserError
from sgm.files import exists
from sgm.preflight import SPATIAL_FACTOR, check_model_section

VIDEO_DATASET = "data_video.SFTDataset"


def check_data_paths(args: TrainingArgs) -> None:
    """Check that `train_data` is set, and that each training or validation data folder exists.

    Raises:
        UserError: `train_data` is empty, or a folder does not exist.
    """
    if not args.train_data:
        raise UserError("args.train_data is empty; set it to at least one data folder")
    for key in ("train_data", "valid_data"):
        for name in getattr(args, key):
            if not exists(name):
                raise UserError(
                    f"args.{key}: {name} does not exist; check the path (to create clips for the "
                    f"bundled model: python -m tools.tiny.draw_clips --output {name} --count 64)"
                )


def check_video_data(data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Check that clips fit the network's position table.

    Only sizes for `data_video.SFTDataset` are checked, because other datasets define their own.

    Raises:
        UserError: `video_size` or `max_num_frames` does not fit the network, or the network is
            missing.
    """
    network = check_model_section(model)
    if data.get("target") != VIDEO_DATASET or not isinstance(data.get("params"), Mapping):
        return
    given, length = (data["params"].get(key) for key in ("video_size", "max_num_frames"))
    size = network.image_size
    if given != size:
        raise UserError(
            f"data.params.video_size: {given!r} must be {size} (height, width), which is "
            f"{SPATIAL_FACTOR} times this model's latent_height and latent_width"
        )
    if isinstance(length, int) and length > network.num_frames:
        raise UserError(
            f"data.params.max_num_frames: {length} must be at most {network.num_frames}, which is "
            "this model's num_frames"
        )
