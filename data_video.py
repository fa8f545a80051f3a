"""Training data: `SFTDataset`, a folder of clips and captions that are decoded on access.

    python data_video.py DIR --base config.yaml

inspects a folder without training. It prints the properties of each usable clip, and the reason
for each skipped clip.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import TrainingArgs, load_config
from sgm.data.decoding import OWN_CHILD
from sgm.data.frames import ClipError, FrameSettings, check_value, no_clip_left
from sgm.data.survey import report, survey_folder, write_sheet
from sgm.distributed import Rank
from sgm.files import expanded
from sgm.training.preflight import VIDEO_DATASET
from sgm.util import check_params
from sgm.video import prepare_sheet

logger = logging.getLogger(__name__)


class SFTDataset(Dataset):
    """Clips with captions from a folder in one of the layouts of `sgm.data.survey`.

    An item is ``{"mp4": float32 (t, 3, h, w) in [-1, 1], "txt": caption}``. Its length t is
    `max_num_frames`; a shorter clip gives an item of the largest 4k + 1 frames that it has. A clip
    with fewer than 5 frames is skipped. Items of different lengths cannot share a batch.

    Frames are chosen by their timestamps, at a rate of `fps`, and rotated as the file specifies. If
    a clip is longer than an item, torch's global generator draws the position of the window.

    Clips that cannot be used are skipped, and a warning gives the reason for each. If decoding the
    frames of an item fails, a warning names the clip, and the next clip is used instead from then
    on. Decoded frames are not cached.

    If several processes train together, all must build their datasets in the same order, because
    building a dataset exchanges the list of clips between the processes.

    Args:
        data_dir: the folder.
        video_size: height and width of the frames. Clips are scaled to cover it, then cropped.
        fps: frames per second.
        max_num_frames: the largest number of frames of an item; 4k + 1.
        skip_frms_num: number of the clip's own frames that are dropped at each end; a whole number.
        random_window: whether each access draws a random window of a clip that is longer than an
            item; if False, the first window is used.

    Attributes:
        clips: the path of each clip that can be used.
        captions: the caption of each clip in `clips`.
        item_lengths: the number of frames that an item has, for each clip in `clips`.

    Raises:
        UserError: a parameter is invalid, or the folder has no clip that can be used.
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
        self._settings = FrameSettings(video_size, fps, max_num_frames, skip_frms_num)
        self.random_window = random_window
        survey = survey_folder(Path(data_dir), self._settings)
        # All processes of a run see the same files, so only the first process logs warnings.
        level = logging.WARNING if Rank.from_environment().index == 0 else logging.DEBUG
        for path, reason in survey.skipped:
            logger.log(level, "%s is skipped: %s", path, reason)
        survey.require_clips()
        count = len(survey.clips)
        logger.info("%s: %d of %d clips can be used", data_dir, count, survey.total)
        self.clips: list[Path] = [clip.path for clip in survey.clips]
        self.captions: list[str] = [clip.caption for clip in survey.clips]
        self._facts = [clip.facts for clip in survey.clips]
        self.item_lengths = [facts.length for facts in self._facts]
        # Shared by the worker processes, so that only one process warns about a clip.
        self._damaged = torch.zeros(len(self.clips), dtype=torch.bool).share_memory_()

    def frame_settings(self) -> dict[str, object]:
        """Return all parameters that determine which frames a clip gives, by name."""
        own = {"skip_frms_num": self._settings.skip, "random_window": self.random_window}
        return asdict(self._settings) | own

    def read_clip(self, index: int, *, position: float = 0.0) -> Tensor:
        """Decode a window of clip `index`: float32 (t, 3, h, w) in [-1, 1].

        If the clip is damaged, no other clip replaces it.

        Args:
            index: from 0 to len(self) - 1.
            position: the relative position of the window in the clip, in [0, 1); 0 is the start.

        Raises:
            ClipError: the clip cannot be decoded.
        """
        facts = self._facts[index]
        first = int(position * facts.num_windows)
        frames = OWN_CHILD.read(self.clips[index], self._settings, facts=facts, first=first)
        planes = frames.permute(0, 3, 1, 2)  # (t, 3, h, w)
        return planes.contiguous().float().div_(127.5).sub_(1)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """Return the item of clip `index`, or of the next clip that can be decoded.

        Raises:
            UserError: no clip is left that can be decoded.
        """
        # Drawn once per access, because later draws must not depend on which clips are damaged.
        position = float(torch.rand((), dtype=torch.float64)) if self.random_window else 0.0
        for step in range(len(self)):
            place = (index + step) % len(self)
            if self._damaged[place]:
                continue
            try:
                video = self.read_clip(place, position=position)
                return {"mp4": video, "txt": self.captions[place]}
            except ClipError as reason:
                self._damaged[place] = True
                logger.warning("%s is skipped: %s", self.clips[place], reason)
        raise no_clip_left(f"{len(self)} clips")


def settings_from_config(data: Mapping[str, Any]) -> FrameSettings:
    """Return the frame settings from the `data` section of a configuration.

    Raises:
        UserError: the section is missing or names another dataset, or a parameter is invalid.
    """
    target, given = data.get("target"), data.get("params") or {}
    expected = f"be {VIDEO_DATASET}; add the configuration file that sets it to --base"
    check_value("data.target", target, expected, valid=target == VIDEO_DATASET)
    check_value("data.params", given, "hold keys", valid=isinstance(given, Mapping))
    params = check_params(SFTDataset, {**given, "data_dir": ""}, where="data")
    names = {field.name for field in fields(FrameSettings)}
    return FrameSettings(**{name: params[name] for name in names & params.keys()})


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect a folder and return the exit code 0.

    Raises:
        UserError: the configuration is invalid, or no clip can be used.
    """
    parser = CommandParser(description="Show which clips of a folder can be used for training.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of clips and captions")
    parser.add_argument(
        "--base", nargs="+", required=True, metavar="YAML", help="configurations, merged in order"
    )
    parser.add_argument(
        "--contact-sheet",
        type=Path,
        metavar="FILE",
        help="picture to write, with frames of the first clips; default: outputs/DIR-clips.png",
    )
    options = parser.parse_args(argv)
    set_up_logging()
    settings = settings_from_config(load_config(TrainingArgs, options.base, {}).data)
    folder = expanded(options.folder)
    sheet = options.contact_sheet or Path("outputs", f"{folder.resolve().name}-clips.png")
    prepare_sheet(sheet, option="--contact-sheet")
    survey = survey_folder(folder, settings)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        for line in report(survey, settings):
            print(line, flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    survey.require_clips()
    shown = write_sheet(survey, settings, sheet)
    print(f"{sheet} shows the first {shown} clips, one row per clip")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
