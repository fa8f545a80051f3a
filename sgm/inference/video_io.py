"""Writing results: mp4, contact sheet and record, each beside its place first, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgm.errors import UserError

_LOW_DISK_BYTES = 1 << 20
_SHEET_FRAMES = 6


def to_uint8(video: Tensor) -> np.ndarray:
    """Video (t, 3, h, w), values clipped to [-1, 1] → (t, h, w, 3) in 0…255."""
    pixels = (video.clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def make_output_folder(path: str | Path) -> Path:
    """Create a folder for results, and try it out, before hours of work depend on it.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise UserError(
            f"output_dir {path} cannot be written to ({error.strerror}); choose another "
            "with --output-dir"
        ) from None
    return folder


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to `path` at the end, removed after a failure.

    Raises:
        UserError: writing failed, with the reason.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or "the video encoder failed"
        if shutil.disk_usage(path.parent).free < _LOW_DISK_BYTES:
            reason = "no space left on device"
        raise UserError(
            f"{path} cannot be written: {reason}; free some space or choose another output_dir"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def write_mp4(chunks: Iterable[np.ndarray], path: Path, *, fps: int) -> None:
    """Write chunks of frames (t, h, w, 3), uint8, as H.264 (yuv420p) as they come.

    Raises:
        UserError: the file cannot be written.
    """
    import imageio.v2 as imageio

    with _replacing(path) as partial:
        with imageio.get_writer(
            partial,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=8,
            macro_block_size=2,  # what yuv420p needs; imageio's 16 would rescale the frames
            ffmpeg_log_level="error",
        ) as writer:
            for chunk in chunks:
                for frame in chunk:
                    writer.append_data(frame)
        if not partial.is_file() or partial.stat().st_size == 0:
            raise OSError(None, None)


def write_contact_sheet(frames: np.ndarray, path: Path) -> None:
    """Write evenly spaced frames of (t, h, w, 3), uint8, side by side as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = np.linspace(0, len(frames) - 1, min(_SHEET_FRAMES, len(frames))).round().astype(int)
    with _replacing(path) as partial:
        Image.fromarray(np.concatenate(list(frames[chosen]), axis=1)).save(partial)


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as indented JSON.

    Raises:
        UserError: the file cannot be written.
    """
    with _replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
