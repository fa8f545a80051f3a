"""Training data: a folder of clips and captions as `SFTDataset`, decoded as it is asked for.

    python data_video.py DIR --base config.yaml

inspects a folder without training: what each clip gives, what is skipped and why.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arguments import parse_config
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import TrainingArgs
from sgm.data.decoding import OWN_CHILD
from sgm.data.frames import ClipError, FrameSettings
from sgm.data.survey import check_sheet_path, report, survey_folder, write_sheet
from sgm.distributed import Rank
from sgm.errors import UserError
from sgm.util import check_params, get_class

logger = logging.getLogger(__name__)


class SFTDataset(Dataset):
    """Clips with captions from a folder in one of the layouts of `sgm.data.layouts`.

    Items are ``{"mp4": float32 (t, 3, h, w) in [-1, 1], "txt": caption}``. Their length t is
    `max_num_frames`, or for a shorter clip the largest 4k + 1 that it has; one with less than 5
    frames is left out. Items of different lengths cannot share a batch.

    Frames are taken at `fps` by their timestamps, and turned as the file says. An item takes one
    number from torch's global generator, which decides where its window begins in a longer clip.

    Clips that cannot be used are named with the reason, and left out. One that turns out damaged
    only when its frames are decoded is named then, and from there on the next clip stands in.
    Nothing that was decoded is kept.

    Where processes train together, all must build it, in the same order: they agree on the clips.

    Args:
        data_dir: the folder.
        video_size: height and width of the frames: clips are scaled to cover it, then cropped.
        fps: frames per second.
        max_num_frames: frames of an item at most; 4k + 1.
        skip_frms_num: frames of the clip's own that are dropped at each end; a whole number.
        random_window: of a longer clip, whether each visit gives another window, or the first.

    Attributes:
        clips: paths of the usable clips, by index.
        captions: their captions.
        item_lengths: frames of the item of each.

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
        random_window: bool = True,
    ) -> None:
        self._settings = FrameSettings.checked(
            video_size, fps=fps, max_num_frames=max_num_frames, skip_frms_num=skip_frms_num
        )
        if not isinstance(random_window, bool):
            raise UserError(f"random_window: {random_window!r} must be true or false")
        self.random_window = random_window
        survey = survey_folder(Path(data_dir), self._settings)
        # All processes of a run see the same files; one of them names what is wrong.
        level = logging.WARNING if Rank.from_environment().index == 0 else logging.DEBUG
        for path, reason in survey.skipped:
            logger.log(level, "%s is skipped: %s", path, reason)
        survey.require_clips()
        total = len(survey.clips) + len(survey.skipped)
        logger.info("%s: %d of %d clips can be used", data_dir, len(survey.clips), total)
        self.clips: list[Path] = [clip.path for clip in survey.clips]
        self.captions: list[str] = [clip.caption for clip in survey.clips]
        self._facts = [clip.facts for clip in survey.clips]
        self.item_lengths = [self._settings.item_length(facts.count) for facts in self._facts]
        # Shared, so that what one worker process found is named only once.
        self._damaged = torch.zeros(len(self.clips), dtype=torch.bool).share_memory_()

    def frame_settings(self) -> dict[str, int | float | list[int]]:
        """All that decides which frames a clip gives, as numbers; the window apart if random."""
        settings = self._settings
        return {
            "video_size": list(settings.video_size),
            "fps": settings.fps,
            "max_num_frames": settings.max_num_frames,
            "skip_frms_num": settings.skip,
            "random_window": self.random_window,
        }

    def read_clip(self, index: int, *, position: float = 0.0) -> Tensor:
        """A window of clip `index` itself: float32 (t, 3, h, w) in [-1, 1].

        Args:
            index: from 0 to len(self) - 1.
            position: from 0, the first window, to below 1, the last one.

        Raises:
            ClipError: it cannot be decoded.
        """
        facts = self._facts[index]
        frames = OWN_CHILD.read(
            self.clips[index],
            self._settings,
            facts=facts,
            first=int(position * self._settings.num_windows(facts.count)),
            length=self._settings.item_length(facts.count),
        )
        planes = frames.permute(0, 3, 1, 2)  # (t, 3, h, w)
        return planes.contiguous().float().div_(127.5).sub_(1)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """Clip `index`, or the next one that can be decoded.

        Raises:
            UserError: no clip can be decoded any more.
        """
        # Drawn once, whichever clip is used: what follows must not depend on what is known damaged.
        position = float(torch.rand((), dtype=torch.float64)) if self.random_window else 0.0
        for step in range(len(self)):
            place = (index + step) % len(self)
            if self._damaged[place]:
                continue
            try:
                return {
                    "mp4": self.read_clip(place, position=position),
                    "txt": self.captions[place],
                }
            except ClipError as reason:
                self._damaged[place] = True
                logger.warning("%s is skipped: %s", self.clips[place], reason)
        raise UserError(f"none of the {len(self)} clips can be decoded; replace their files")


def settings_from_config(data: Mapping[str, Any]) -> FrameSettings:
    """The settings of a configuration's `data` section.

    Raises:
        UserError: it is absent or of another dataset, or a parameter is wrong.
    """
    target = data.get("target")
    if not target:
        raise UserError("the configuration has no data.target; add a file that has it to --base")
    if get_class(target).__name__ != SFTDataset.__name__:
        raise UserError(f"data.target: {target!r} must be data_video.SFTDataset")
    given = data.get("params") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"data.params must hold keys, not {given!r}")
    params = check_params(SFTDataset, {**given, "data_dir": ""}, where="data")
    names = ("video_size", "fps", "max_num_frames")
    values = {name: params[name] for name in names}
    return FrameSettings.checked(**values, skip_frms_num=params.get("skip_frms_num", 3.0))


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect a folder; returns the exit code, 0 if there are usable clips."""
    parser = CommandParser(description="What a folder of clips gives for training.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of clips and captions")
    parser.add_argument(
        "--base", nargs="+", required=True, metavar="YAML", help="configurations, merged in order"
    )
    parser.add_argument(
        "--contact-sheet",
        type=Path,
        metavar="FILE",
        help="picture of the first clips; default: outputs/DIR-clips.png",
    )
    options = parser.parse_args(argv)
    set_up_logging()
    settings = settings_from_config(parse_config(TrainingArgs, "", ["--base", *options.base]).data)
    folder = options.folder.expanduser()
    sheet = options.contact_sheet or Path("outputs", f"{folder.resolve().name}-clips.png")
    check_sheet_path(sheet)
    survey = survey_folder(folder, settings)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        for line in report(survey, settings):
            print(line, flush=True)
    except BrokenPipeError:  # who reads has seen enough: head, for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    survey.require_clips()
    shown = write_sheet(survey, settings, sheet)
    print(f"{sheet} shows the first {shown}, a row each")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
