"""Finds the clips and captions of a data folder, checks which clips can be used, and reports it.

A folder has one of these layouts:

1. ``videos/NAME.mp4`` and ``labels/NAME.txt``, at any depth; the whole file is the caption.
2. ``metadata.csv`` or ``metadata.jsonl``, with a column for the clip and one for its caption.
3. ``videos.txt`` and ``prompts.txt`` (or ``prompt.txt``): line i of ``videos.txt`` names a clip,
   and line i of ``prompts.txt`` is its caption.
4. ``NAME.mp4`` beside ``NAME.txt``, at any depth; the whole file is the caption.

If a folder has several layouts, the first one in this list is used, and a warning names the others.
In layouts 2 and 3, the paths of clips are absolute or relative to the folder.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sgm.data.decoding import OWN_CHILD, probe_clips
from sgm.data.frames import ClipError, ClipFacts, FrameSettings, difference_in_length, no_clip_left
from sgm.errors import UserError
from sgm.video import write_contact_sheet

logger = logging.getLogger(__name__)

LAYOUTS = (
    "videos/NAME.mp4 with its caption in labels/NAME.txt (subfolders are allowed), "
    "NAME.mp4 beside NAME.txt, videos.txt with prompts.txt, or metadata.csv or .jsonl"
)
CONTAINERS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
CLIP_COLUMNS = ("file_name", "video", "video_path", "path", "file_path", "filename", "file")
CAPTION_COLUMNS = ("text", "caption", "prompt")
TABLES = ("metadata.csv", "metadata.jsonl")
PROMPT_LISTS = ("prompts.txt", "prompt.txt")
VIDEO_LIST = "videos.txt"
# A lone surrogate, half of a UTF-16 character. JSON can represent it, but UTF-8 cannot.
_SURROGATE = re.compile("[\ud800-\udfff]")

# The path of a clip and its caption, or the reason why it has no caption.
Sample = tuple[Path, "str | ClipError"]


def _warn_of_folder(error: OSError) -> None:
    logger.warning("%s is skipped: it cannot be read (%s)", error.filename, error.strerror)


def _is_circle(folder: Path) -> bool:
    """Return whether a folder is a link to one of its own parent folders."""
    return os.path.realpath(folder) in {os.path.realpath(above) for above in folder.parents}


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files below `folder` that are not hidden. Links are followed, except in a loop."""
    for place, folders, names in os.walk(folder, onerror=_warn_of_folder, followlinks=True):
        here = Path(place)
        # Hidden files and folders are skipped, because copying tools leave some behind.
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in shown if not _is_circle(here / name)]
        yield from (here / name for name in names if not name.startswith("."))


def _label_path(clip: Path, folder: Path) -> Path:
    """Return a clip's caption file: its path with the innermost ``videos`` replaced by ``labels``.

    Folders above `folder` are not considered.
    """
    parts = list(clip.relative_to(folder).parts)
    innermost = max(i for i, part in enumerate(parts[:-1]) if part == "videos")
    parts[innermost] = "labels"
    return folder.joinpath(*parts).with_suffix(".txt")


def _read_text(path: Path) -> str:
    if not os.path.isfile(path):  # reading a named pipe would block forever
        raise UserError(f"{path} does not exist")
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be UTF-8 text") from None


def _sample(clip: Path, caption: object, where: str) -> Sample:
    """Return a clip with its stripped caption, or with a ClipError if the caption is invalid.

    `where` is the place of the caption, for the message.
    """
    if isinstance(caption, str) and caption.strip() and not _SURROGATE.search(caption):
        return clip, caption.strip()
    return clip, ClipError(f"{where} holds no text")


def _listed(line: Path, name: object, caption: object, caption_line: object) -> Sample:
    """Return the sample of a clip that a line of a file names.

    Args:
        line: the place of the clip's name, ``FILE:NUMBER``.
        name: the clip's path, absolute or relative to the folder of the file.
        caption: the caption.
        caption_line: the place of the caption, ``FILE:NUMBER``.
    """
    if not isinstance(name, str) or not name.strip():
        return line, ClipError("the line names no clip")
    return _sample(line.parent / name.strip(), caption, f"its caption, {caption_line},")


def _from_captions(clips: Iterable[Path], caption_path: Callable[[Path], Path]) -> list[Sample]:
    """Return a sample per clip. Its caption is the whole text file at `caption_path(clip)`."""
    samples: list[Sample] = []
    for clip in clips:
        label = caption_path(clip)
        try:
            samples.append(_sample(clip, _read_text(label), f"its label {label}"))
        except UserError as error:
            samples.append((clip, ClipError(f"its label {error}")))
    return samples


def _from_lists(prompts: Path, videos: Path) -> list[Sample]:
    """Return a sample per line: a path from `videos`, and the caption from `prompts`.

    Raises:
        UserError: a file cannot be read, or the numbers of lines differ.
    """
    # rstrip removes empty lines at the end. str.splitlines is not used, because it also splits at
    # other characters that captions may contain.
    captions, names = (_read_text(path).rstrip().split("\n") for path in (prompts, videos))
    if len(captions) != len(names):
        raise UserError(
            f"{prompts} has {len(captions)} lines, {videos} has {len(names)}; both must have one "
            "line per clip, in the same order"
        )
    return [
        _listed(Path(f"{videos}:{number}"), name, caption, f"{prompts}:{number}")
        for number, (name, caption) in enumerate(zip(names, captions, strict=True), 1)
    ]


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table as (line number, {column: value}).

    Raises:
        UserError: the file cannot be read, or is not a table.
    """
    text = _read_text(path)
    number, reader = 0, csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if path.suffix == ".csv":
            expected = "the file must be CSV, with quotes around captions that contain commas"
            for row in reader:
                rest = row.pop(None, [])  # values without a column
                if any(value.strip() for value in rest):
                    raise ValueError("the row has more values than the first line has columns")
                yield reader.line_num, row
        else:
            expected = "each line must be one JSON object in braces"
            for number, line in enumerate(text.split("\n"), 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("the line is not a JSON object")
                yield number, row
    except (csv.Error, ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number or reader.line_num}: {error}; {expected}") from None


def _column(path: Path, known: Iterable[str], row: dict[str, Any], *, what: str) -> str:
    """Return the column of `row` whose name comes first in `known`; case is ignored.

    Raises:
        UserError: there is no such column.
    """
    columns = {str(name).strip().lower(): name for name in row}
    for name in known:
        if name in columns:
            return columns[name]
    raise UserError(
        f"{path} has no column for the {what} (columns: {', '.join(columns) or 'none'}); "
        f"rename one of them to {' or '.join(known)}"
    )


def _from_table(path: Path) -> list[Sample]:
    """Return a sample per row. The columns of the first row decide which columns are used.

    Raises:
        UserError: the file is not a table, or a column is missing.
    """
    rows = [(Path(f"{path}:{number}"), row) for number, row in _table_rows(path)]
    if not rows:
        return []
    clip = _column(path, CLIP_COLUMNS, rows[0][1], what="clip")
    caption = _column(path, CAPTION_COLUMNS, rows[0][1], what="caption")
    logger.info("%s: clips from %r, captions from %r", path, clip, caption)
    return [_listed(line, row.get(clip), row.get(caption), line) for line, row in rows]


def _layouts_of(folder: Path) -> dict[str, Callable[[], list[Sample]]]:
    """Return the layouts of `folder` as {name: function that reads it}, the preferred one first."""
    clips = sorted(path for path in _walk(folder) if path.suffix.lower() in CONTAINERS)
    in_videos = [clip for clip in clips if "videos" in clip.relative_to(folder).parts[:-1]]
    label = partial(_label_path, folder=folder)
    beside = partial(Path.with_suffix, suffix=".txt")
    from_labels = partial(_from_captions, in_videos, label)
    from_neighbours = partial(_from_captions, clips, beside)
    videos = folder / VIDEO_LIST
    found: dict[str, Callable[[], list[Sample]]] = {}
    if any(os.path.exists(label(clip)) for clip in in_videos):
        found["videos/ and labels/"] = from_labels
    for path in (folder / name for name in TABLES):
        if path.is_file():
            found[path.name] = partial(_from_table, path)
    for path in (folder / name for name in PROMPT_LISTS):
        if path.is_file() and videos.is_file():
            found[f"{path.name} and {VIDEO_LIST}"] = partial(_from_lists, path, videos)
    if any(os.path.isfile(beside(clip)) for clip in clips):
        found["captions beside the clips"] = from_neighbours
    # If no clip has a caption, the function returns the reason for each clip.
    return found or {"": from_labels if in_videos else from_neighbours}


def find_samples(folder: Path) -> list[Sample]:
    """Return all clips of `folder`, each with its caption or the reason why it has none.

    Raises:
        UserError: the folder does not exist or cannot be read, or a file that lists clips is
            invalid.
    """
    try:
        os.listdir(folder)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"data folder {folder} cannot be read ({reason}); it must be a folder with {LAYOUTS}"
        ) from None
    layouts = _layouts_of(folder)
    used, *others = layouts
    if others:
        unused = ", ".join(others)
        logger.warning("%s: captions are taken from %s, not from %s", folder, used, unused)
    return layouts[used]()


@dataclass(frozen=True)
class Clip:
    """A clip that can be used: its path, caption and properties."""

    path: Path
    caption: str
    facts: ClipFacts


@dataclass
class Survey:
    """The result of `survey_folder`. Clips are in the order in which the layout lists them.

    Attributes:
        folder: the data folder.
        clips: the clips that can be used.
        skipped: the path of each clip that cannot be used, and the reason.
    """

    folder: Path
    clips: list[Clip] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of all clips, including those that cannot be used."""
        return len(self.clips) + len(self.skipped)

    def require_clips(self) -> None:
        """Raise UserError if no clip can be used."""
        if not self.clips:
            what = f"none of its {self.total} clips can be used" if self.total else "it has no clip"
            raise UserError(f"data folder {self.folder}: {what}; it must contain {LAYOUTS}")


def survey_folder(folder: Path, settings: FrameSettings) -> Survey:
    """Inspect all clips of `folder`. This decodes the first frame of each clip.

    If several processes train together, all must call this (see `probe_clips`).

    Raises:
        UserError: the folder does not exist, a file that lists clips is invalid, or clips cannot
            be decoded on this machine.
    """
    samples = find_samples(folder)
    captioned = [path for path, caption in samples if isinstance(caption, str)]
    probed = iter(probe_clips(captioned, settings))
    survey = Survey(folder)
    for path, caption in samples:
        facts = next(probed) if isinstance(caption, str) else caption
        if isinstance(caption, str) and isinstance(facts, ClipFacts):
            survey.clips.append(Clip(path, caption, facts))
        else:
            survey.skipped.append((path, str(facts)))
    return survey


_SHEET_CLIPS = 16
_SHEET_COLUMNS = 6
_SHEET_WIDTH = 240  # largest width of a frame in pixels


def report(survey: Survey, settings: FrameSettings) -> Iterator[str]:
    """Yield the lines of the report: usable clips, skipped clips with the reason, and totals."""

    def name(path: Path) -> Path:
        return path.relative_to(survey.folder) if path.is_relative_to(survey.folder) else path

    for clip in survey.clips:
        facts, windows = clip.facts, clip.facts.num_windows
        yield (
            f"{name(clip.path)}: {facts.frames} frames of {facts.width}x{facts.height} at "
            f"{facts.rate:.4g} fps, {facts.seconds:.2f} s; {facts.count} frames at "
            f"{settings.fps:g} fps; {windows} window{'s' * (windows > 1)} of "
            f"{facts.length} frames; caption of {len(clip.caption.split())} words"
        )
    for path, reason in survey.skipped:
        yield f"{name(path)} is skipped: {reason}"
    seconds = sum(clip.facts.seconds for clip in survey.clips)
    usable = len(survey.clips)
    yield (
        f"{usable} of {survey.total} clips can be used: {seconds:.1f} s "
        f"({seconds / 3600:.2f} h), {usable} samples per epoch"
    )
    if difference := difference_in_length(clip.facts.length for clip in survey.clips):
        yield difference


def write_sheet(survey: Survey, settings: FrameSettings, path: Path) -> int:
    """Write a picture with a row of frames for each of the first clips.

    Frames are cropped like those for training, but scaled to a smaller size. A warning names each
    clip that cannot be decoded.

    Returns:
        The number of rows.

    Raises:
        UserError: the file cannot be written, or none of these clips can be decoded.
    """
    height, width = settings.video_size
    small_width = min(width, _SHEET_WIDTH)
    small_size = (max(1, round(height * small_width / width)), small_width)
    small = replace(settings, video_size=small_size)
    rows = []
    for clip in survey.clips[:_SHEET_CLIPS]:
        try:
            frames = OWN_CHILD.read(clip.path, small, facts=clip.facts, first=0)
        except ClipError as reason:
            logger.warning("%s is not on the contact sheet: %s", clip.path, reason)
            continue
        columns = np.linspace(0, len(frames) - 1, _SHEET_COLUMNS).round().astype(int)
        rows.append(frames.numpy()[columns])  # (columns, h, w, 3)
    if not rows:
        raise no_clip_left(f"first clips of {survey.folder}")
    write_contact_sheet(np.concatenate(rows, axis=1), path)
    return len(rows)
