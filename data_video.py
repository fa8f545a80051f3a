"""Training data: a folder of clips and captions as `SFTDataset`, decoded as it is asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sgm.clips import (
    ClipError,
    count_at_rate,
    frame_starts,
    nearest_frames,
    open_clip,
    probe_clips,
    read_frames,
)
from sgm.errors import UserError

logger = logging.getLogger(__name__)

LAYOUT = "videos/NAME.mp4 with its caption in labels/NAME.txt (folders in between are fine)"
# Two latent frames: a shorter clip shows no motion.
MIN_FRAMES = 5


def find_clips(folder: Path) -> list[Path]:
    """All ``.mp4`` files below a folder named ``videos`` in `folder`, sorted; follows links."""
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        if "videos" in Path(place).relative_to(folder).parts:
            # Hidden files are what copying tools leave behind.
            names = [name for name in names if not name.startswith(".")]
            found += [Path(place, name) for name in names if name.lower().endswith(".mp4")]
    return sorted(found)


def label_path(clip: Path, folder: Path) -> Path:
    """The caption's file: the innermost ``videos`` below `folder` becomes ``labels``."""
    parts = list(clip.relative_to(folder).parts)
    innermost = max(i for i, part in enumerate(parts[:-1]) if part == "videos")
    parts[innermost] = "labels"
    return folder.joinpath(*parts).with_suffix(".txt")


def read_caption(path: Path) -> str:
    """The whole file, stripped.

    Raises:
        ClipError: there is no such file, or it is not text or empty.
    """
    try:
        caption = path.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        raise ClipError(f"its label {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClipError(f"its label {path} cannot be read ({error})") from None
    if not caption:
        raise ClipError(f"its label {path} is empty")
    return caption


class SFTDataset(Dataset):
    """Clips with captions: ``videos/NAME.mp4`` and ``labels/NAME.txt``, any depth below a folder.

    Items are ``{"mp4": float32 (t, 3, h, w) in [-1, 1], "txt": caption}``. Their length t is
    `max_num_frames`, or for shorter clips the longest 4k + 1 that they have, at least 5. Clips of
    different lengths cannot share a batch: a batch size above 1 needs clips that are all long
    enough.

    Frames are taken at `fps` by their timestamps. Of a longer clip each visit gives a window that
    is drawn anew from torch's global generator, which data loaders seed.

    Clips that cannot be used are named with the reason, and left out. One that turns out damaged
    only when its frames are decoded is named then, and from there on the next clip stands in.

    Args:
        data_dir: the folder.
        video_size: height and width of the frames: clips are scaled to cover it, then cropped.
        fps: frames per second.
        max_num_frames: frames of an item at most; 4k + 1.
        skip_frms_num: frames of the clip's own that are dropped at each end; a whole number.

    Raises:
        UserError: a parameter is wrong, or the folder holds no usable clip.
    """

    def __init__(
        self,
        data_dir: str | Path,
        video_size: Sequence[int],
        *,
        fps: float,
        max_num_frames: int,
        skip_frms_num: float = 3.0,
    ) -> None:
        size = list(video_size) if isinstance(video_size, Sequence) else []
        if len(size) != 2 or not all(isinstance(pixels, int) and pixels > 0 for pixels in size):
            raise UserError(f"video_size: {video_size!r} must be [height, width] in pixels")
        if not isinstance(fps, int | float) or fps <= 0:
            raise UserError(f"fps: {fps!r} must be a number above 0")
        if not isinstance(max_num_frames, int) or max_num_frames < 1 or max_num_frames % 4 != 1:
            raise UserError(f"max_num_frames: {max_num_frames!r} must be 4k + 1: 1, 5, 9, … 49 …")
        if not isinstance(skip_frms_num, int | float) or skip_frms_num < 0 or skip_frms_num % 1:
            raise UserError(f"skip_frms_num: {skip_frms_num!r} must be a whole number from 0")
        self.video_size = tuple(size)
        self.fps = fps
        self.max_num_frames = max_num_frames
        self.skip = int(skip_frms_num)
        self.clips: list[Path] = []
        self.captions: list[str] = []
        self._collect(Path(data_dir))
        # Shared, so that what one worker process found is named only once.
        self._damaged = torch.zeros(len(self.clips), dtype=torch.bool).share_memory_()

    def _collect(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist; it must hold {LAYOUT}")
        # All processes of a run see the same files; one of them names what is wrong.
        level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.DEBUG
        found = find_clips(folder)
        probed = probe_clips(found, skip=self.skip, fps=self.fps)
        for path, result in zip(found, probed, strict=True):
            try:
                self._check_count(result)
                self.captions.append(read_caption(label_path(path, folder)))
                self.clips.append(path)
            except ClipError as reason:
                logger.log(level, "%s is skipped: %s", path, reason)
        logger.info("%s: %d of %d clips can be used", folder, len(self.clips), len(found))
        if not self.clips:
            what = f"none of its {len(found)} clips can be used" if found else "no clip is in it"
            raise UserError(f"data folder {folder}: {what}; it must hold {LAYOUT}")

    def _check_count(self, count: int | ClipError) -> int:
        """`count` frames, as they are enough; raises ClipError where not, or where it is one."""
        if isinstance(count, ClipError):
            raise count
        needed = min(MIN_FRAMES, self.max_num_frames)
        if count < needed:
            without = f" without {self.skip} at each end" if self.skip else ""
            raise ClipError(
                f"it is too short: frames at {self.fps} fps{without}: {count}, needed: {needed}"
            )
        return count

    def _decode(self, path: Path) -> Tensor:
        """A window of the clip as float32 (t, 3, h, w) in [-1, 1]; ClipError where it fails."""
        reader = open_clip(path)
        starts = frame_starts(reader, self.skip)
        count = self._check_count(count_at_rate(starts, self.fps))
        length = min(count, self.max_num_frames)
        length -= (length - 1) % 4
        first = int(torch.randint(count - length + 1, ()))
        times = starts[0] + torch.arange(first, first + length) / self.fps
        chosen = nearest_frames(starts, times) + self.skip
        frames = read_frames(reader, chosen, size=self.video_size)
        return frames.contiguous().float().div_(127.5).sub_(1)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """Clip `index`, or the next one that can be decoded.

        Raises:
            UserError: no clip can be decoded any more.
        """
        for step in range(len(self)):
            place = (index + step) % len(self)
            if self._damaged[place]:
                continue
            try:
                return {"mp4": self._decode(self.clips[place]), "txt": self.captions[place]}
            except ClipError as reason:
                self._damaged[place] = True
                logger.warning("%s is skipped: %s", self.clips[place], reason)
        raise UserError(f"none of the {len(self)} clips can be decoded; replace their files")
