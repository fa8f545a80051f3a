"""Write results atomically: the mp4, the contact sheet and the JSON record of a video."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgm.errors import UserError
from sgm.files import expanded, make_output_folder, replacing

logger = logging.getLogger(__name__)


_SHEET_FRAMES = 6


def to_uint8(video: Tensor) -> np.ndarray:
    """Convert a video (t, 3, h, w) from [-1, 1] to uint8 (t, h, w, 3); clip values outside."""
    pixels = (video.clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def mp4_path(path: str | Path) -> Path:
    """Check the path of an mp4 to write, and return it as an absolute path; create nothing.

    Raises:
        UserError: the path does not end in .mp4, or its folder cannot be written to.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    problem = "must be the path of an mp4, such as video.mp4"
    if isinstance(text, str) and text.lower().endswith(".mp4") and "\0" not in text:
        place = Path(os.path.abspath(expanded(text)))
        above = next(folder for folder in place.parents if os.path.lexists(folder))
        if os.path.isdir(above) and os.access(above, os.W_OK) and not os.path.isdir(place):
            return place
        problem = f"cannot be written in {above}; choose another folder"
    raise UserError(f"path: {text!r} {problem}")


def write_mp4(chunks: Iterable[np.ndarray], path: Path, *, fps: float) -> None:
    """Write uint8 frames as H.264 (yuv420p), one chunk at a time.

    Args:
        chunks: the frames in order, in arrays (t, h, w, 3). All frames have the same size.
        path: the mp4 to write. Its folder is created if missing.
        fps: frames per second.

    Raises:
        UserError: the file cannot be written.
    """
    import imageio.v2
    from imageio_ffmpeg import count_frames_and_secs

    num_frames = 0
    make_output_folder(path.parent)
    with replacing(path) as partial:
        get_writer: Any = imageio.v2.get_writer  # its annotations differ from its documentation
        with get_writer(
            partial,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=8,
            macro_block_size=2,  # yuv420p needs 2; imageio's default 16 would rescale the frames
            ffmpeg_log_level="quiet",
        ) as writer:
            for chunk in chunks:
                for frame in chunk:
                    writer.append_data(frame)
                    num_frames += 1
        # Count the frames, because imageio does not report if ffmpeg fails at the end, for example
        # on a full disk.
        try:
            written, _ = count_frames_and_secs(str(partial))
        except RuntimeError:
            written = 0
        if written != num_frames:
            raise OSError(None, None)


def prepare_sheet(path: Path, *, option: str) -> None:
    """Check that a contact sheet can be written to the path that `option` gave; make its folder.

    Raises:
        UserError: it is not the name of a picture, or its folder cannot be written to.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{option}: {str(path)!r} must end with .png or .jpg")
    make_output_folder(path.parent)


def write_contact_sheet(frames: np.ndarray, path: Path, *, above: Path | None = None) -> None:
    """Write a few evenly spaced frames of a video side by side as a PNG.

    Args:
        frames: the frames of the video (t, h, w, 3), uint8.
        path: the PNG to write.
        above: path of another sheet. It is placed above the new sheet if it exists and has the same
            width.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = np.linspace(0, len(frames) - 1, min(_SHEET_FRAMES, len(frames))).round().astype(int)
    rows = [np.concatenate(list(frames[chosen]), axis=1)]  # (h, n w, 3)
    other = None if above is None else _read_sheet(above)
    if other is not None and other.shape[1] == rows[0].shape[1]:
        rows.insert(0, other)
    with replacing(path) as partial:
        Image.fromarray(np.concatenate(rows, axis=0)).save(partial)


def _read_sheet(path: Path) -> np.ndarray | None:
    """Return the pixels (h, w, 3) of a sheet, uint8; None if the file is missing or damaged."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow: SyntaxError for a damaged PNG
        logger.debug("%s: %s", path, error)
        return None


def collect_frames(chunks: Iterable[np.ndarray], path: Path | None, *, fps: float) -> np.ndarray:
    """Return all frames of `chunks` in one array (t, h, w, 3), and write them to an mp4.

    The mp4 is written chunk by chunk, as the chunks arrive.

    Args:
        chunks: the frames in order, in arrays (t, h, w, 3), uint8.
        path: the mp4 to write; None writes nothing.
        fps: frames per second.

    Raises:
        UserError: the file cannot be written.
    """
    written, kept = itertools.tee(chunks)
    if path is not None:
        write_mp4(written, path, fps=fps)
    frames = list(kept)
    return np.concatenate(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write `record` as indented JSON in UTF-8.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
