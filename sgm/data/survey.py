"""Which clips of a folder can be used, with what they hold, and why the others cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sgm.data.decoding import probe_clips
from sgm.data.frames import ClipError, ClipFacts, FrameSettings
from sgm.data.layouts import LAYOUTS, find_samples
from sgm.errors import UserError


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
