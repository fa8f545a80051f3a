"""Writing results: mp4, contact sheet and record, each beside its place first, then renamed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgm.files import replacing

_SHEET_FRAMES = 6


def to_uint8(video: Tensor) -> np.ndarray:
    """Video (t, 3, h, w), values clipped to [-1, 1] → (t, h, w, 3) in 0…255."""
    pixels = (video.clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def write_mp4(chunks: Iterable[np.ndarray], path: Path, *, fps: int) -> None:
    """Write chunks of frames (t, h, w, 3), uint8, as H.264 (yuv420p) as they come.

    Raises:
        UserError: the file cannot be written.
    """
    import imageio.v2 as imageio
    from imageio_ffmpeg import count_frames_and_secs

    num_frames = 0
    with replacing(path) as partial:
        with imageio.get_writer(
            partial,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=8,
            macro_block_size=2,  # what yuv420p needs; imageio's 16 would rescale the frames
            ffmpeg_log_level="quiet",
        ) as writer:
            for chunk in chunks:
                for frame in chunk:
                    writer.append_data(frame)
                    num_frames += 1
        # imageio does not tell when ffmpeg fails at the end, on a full disk for one: so count.
        try:
            written, _ = count_frames_and_secs(str(partial))
        except RuntimeError:
            written = 0
        if written != num_frames:
            raise OSError(None, None)


def write_contact_sheet(frames: np.ndarray, path: Path) -> None:
    """Write evenly spaced frames of (t, h, w, 3), uint8, side by side as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = np.linspace(0, len(frames) - 1, min(_SHEET_FRAMES, len(frames))).round().astype(int)
    with replacing(path) as partial:
        Image.fromarray(np.concatenate(list(frames[chosen]), axis=1)).save(partial)


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as indented JSON.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
