"""Which clips of a folder can be used, why the others cannot, and a report of both."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sgm.data.decoding import OWN_CHILD, probe_clips
from sgm.data.frames import ClipError, ClipFacts, FrameSettings, difference_in_length
from sgm.data.layouts import LAYOUTS, find_samples
from sgm.errors import UserError
from sgm.files import make_output_folder
from sgm.video import write_contact_sheet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A clip that can be used."""

    path: Path
    caption: str
    facts: ClipFacts


@dataclass
class Survey:
    """What `survey_folder` found, in the order of the folder's layout."""

    folder: Path
    clips: list[Clip] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def require_clips(self) -> None:
        """Raise UserError where no clip can be used."""
        if not self.clips:
            count = len(self.skipped)
            what = f"none of its {count} clips can be used" if count else "no clip is in it"
            raise UserError(f"data folder {self.folder}: {what}; it must hold {LAYOUTS}")


def survey_folder(folder: Path, settings: FrameSettings) -> Survey:
    """Look at all clips of `folder`; their first frames are decoded.

    Where processes train together, all must call it: see `probe_clips`.

    Raises:
        UserError: there is no such folder, a file that lists clips is wrong, or clips cannot be
            decoded on this machine.
    """
    samples = find_samples(folder)
    captioned = [path for path, caption in samples if not isinstance(caption, ClipError)]
    facts = iter(probe_clips(captioned, settings))
    survey = Survey(folder)
    for path, caption in samples:
        try:
            if isinstance(caption, ClipError):
                raise caption
            found = next(facts)
            if isinstance(found, ClipError):
                raise found
            settings.item_length(found.count)
            survey.clips.append(Clip(path, caption, found))
        except ClipError as reason:
            survey.skipped.append((path, str(reason)))
    return survey


_SHEET_CLIPS = 16
_SHEET_COLUMNS = 6
_SHEET_WIDTH = 240  # pixels of a frame
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")


def _name(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _clip_line(clip: Clip, survey: Survey, settings: FrameSettings) -> str:
    facts = clip.facts
    windows = settings.num_windows(facts.count)
    return (
        f"{_name(clip.path, survey.folder)}: {facts.frames} frames of {facts.width}x{facts.height} "
        f"at {facts.rate:.4g} fps, {facts.seconds:.2f} s; {facts.count} at {settings.fps:g} fps, "
        f"items of {settings.item_length(facts.count)} from {windows} "
        f"window{'s' * (windows > 1)}; caption of {len(clip.caption.split())} words"
    )


def report(survey: Survey, settings: FrameSettings) -> Iterator[str]:
    """The lines of the report: each clip, what is skipped and why, totals."""
    for clip in survey.clips:
        yield _clip_line(clip, survey, settings)
    for path, reason in survey.skipped:
        yield f"{_name(path, survey.folder)} is skipped: {reason}"
    seconds = sum(clip.facts.seconds for clip in survey.clips)
    total = len(survey.clips) + len(survey.skipped)
    yield (
        f"{len(survey.clips)} of {total} clips can be used: {seconds:.1f} s ({seconds / 3600:.2f} "
        f"h), {len(survey.clips)} samples an epoch"
    )
    lengths = [settings.item_length(clip.facts.count) for clip in survey.clips]
    if difference := difference_in_length(lengths):
        yield difference


def check_sheet_path(path: Path) -> None:
    """Find out before the work whether a contact sheet can be written to `path`.

    Raises:
        UserError: the name is no picture's, or the folder cannot be written to.
    """
    if path.suffix.lower() not in SHEET_SUFFIXES:
        raise UserError(f"--contact-sheet {path}: the name must end with .png or .jpg")
    make_output_folder(path.parent)


def write_sheet(survey: Survey, settings: FrameSettings, path: Path) -> int:
    """Write the first clips as rows of frames, cut as for training but small; returns their number.

    Raises:
        UserError: the file cannot be written, or none of the clips can be decoded.
    """
    height, width = settings.video_size
    small_width = min(width, _SHEET_WIDTH)
    small = FrameSettings(
        video_size=(max(1, round(height * small_width / width)), small_width),
        fps=settings.fps,
        max_num_frames=settings.max_num_frames,
        skip=settings.skip,
    )
    rows = []
    for clip in survey.clips[:_SHEET_CLIPS]:
        length = settings.item_length(clip.facts.count)
        try:
            frames = OWN_CHILD.read(clip.path, small, facts=clip.facts, first=0, length=length)
        except ClipError as reason:
            logger.warning("%s is not on the contact sheet: %s", clip.path, reason)
            continue
        columns = np.linspace(0, length - 1, _SHEET_COLUMNS).round().astype(int)
        rows.append(frames.numpy()[columns])  # (columns, h, w, 3)
    if not rows:
        raise UserError(f"none of the first clips of {survey.folder} can be decoded")
    write_contact_sheet(np.concatenate(rows, axis=1), path)
    return len(rows)
