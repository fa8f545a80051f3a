"""The layouts in which a folder may hold clips and captions, told apart by what the folder holds.

1. ``videos/NAME.mp4`` and ``labels/NAME.txt``, at any depth; a caption is a whole file.
2. ``metadata.csv`` or ``metadata.jsonl``: a column for the clip and one for its caption.
3. ``videos.txt`` and ``prompts.txt`` (or ``prompt.txt``): a clip a line, its caption in that line.
4. ``NAME.mp4`` beside ``NAME.txt``, at any depth; a caption is a whole file.

Of several in one folder the first in this list is used, with a warning. Names in the files of 2
and 3 are relative to the folder, or absolute.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sgm.data.frames import ClipError
from sgm.errors import UserError

logger = logging.getLogger(__name__)

LAYOUTS = (
    "videos/NAME.mp4 with its caption in labels/NAME.txt (folders in between are fine), "
    "NAME.mp4 beside NAME.txt, videos.txt with prompts.txt, or metadata.csv or .jsonl"
)
CONTAINERS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
CLIP_COLUMNS = ("file_name", "video", "video_path", "path", "file_path", "filename", "file")
CAPTION_COLUMNS = ("text", "caption", "prompt")
TABLES = ("metadata.csv", "metadata.jsonl")
PROMPT_LISTS = ("prompts.txt", "prompt.txt")
VIDEO_LIST = "videos.txt"

Sample = tuple[Path, "str | ClipError"]


def _walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below `folder` that are not hidden; follows links, but in no circle."""
    try:
        status = folder.stat()
        # Hidden files are what copying tools leave behind.
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        logger.warning("%s is skipped: it cannot be read (%s)", folder, error.strerror)
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for path in (folder / name for name in names):
        # Unlike pathlib's, these say no of what cannot be looked up, a link to itself for one.
        if os.path.isdir(path):
            yield from _walk(path, (*above, identity))
        else:
            yield path


def find_clips(folder: Path) -> list[Path]:
    """All files below `folder` that are clips by their names, sorted."""
    return sorted(path for path in _walk(folder) if path.suffix.lower() in CONTAINERS)


def label_path(clip: Path, folder: Path) -> Path:
    """The caption's file: the innermost ``videos`` below `folder` becomes ``labels``."""
    parts = list(clip.relative_to(folder).parts)
    innermost = max(i for i, part in enumerate(parts[:-1]) if part == "videos")
    parts[innermost] = "labels"
    return folder.joinpath(*parts).with_suffix(".txt")


def read_caption(path: Path) -> str | ClipError:
    """The whole file, stripped; or the reason where there is none, it is not text, or empty."""
    if not os.path.isfile(path):  # nor a pipe, from which one would wait for ever
        return ClipError(f"its label {path} does not exist")
    try:
        caption = path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        return ClipError(f"its label {path} cannot be read ({error})")
    return caption or ClipError(f"its label {path} is empty")


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be UTF-8 text") from None


def _read_lines(path: Path) -> list[str]:
    """Lines, stripped, without empty ones at the end."""
    # Captions may hold other characters that str.splitlines takes for the end of a line.
    return [line.strip() for line in _read_text(path).rstrip().split("\n")]


def _from_lists(prompts: Path, videos: Path) -> list[Sample]:
    """Line i of both files is a sample.

    Raises:
        UserError: their numbers of lines differ.
    """
    captions, names = _read_lines(prompts), _read_lines(videos)
    if len(captions) != len(names):
        raise UserError(
            f"{prompts} has {len(captions)} lines, {videos} has {len(names)}; line i of one "
            "belongs to line i of the other"
        )
    samples = []
    for number, (caption, name) in enumerate(zip(captions, names, strict=True), 1):
        place = videos.parent / name if name else Path(f"{videos}:{number}")
        reason = None if caption else ClipError(f"its caption, {prompts}:{number}, is empty")
        samples.append((place, reason or caption if name else ClipError("the line is empty")))
    return samples


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table as number of line and values by column; UserError where it is none."""
    text = _read_text(path)
    if path.suffix == ".csv":
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            for row in reader:
                rest = row.pop(None, [])  # what there are no columns for
                if any(value.strip() for value in rest):
                    raise UserError(
                        f"{path}:{reader.line_num}: the row has more values than the first line "
                        "has columns; a caption with commas must be in quotes"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}; it must be CSV") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {error}; a line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a line must be one JSON object in braces")
        yield number, row


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _column(path: Path, known: Iterable[str], row: dict[str, Any], *, what: str) -> str:
    """The first of the `known` names that is a column of `row`; UserError where none is."""
    columns = {str(name).strip().lower(): name for name in row}
    for name in known:
        if name in columns:
            return columns[name]
    raise UserError(
        f"{path} has no column for the {what}: it has {', '.join(columns) or 'none'}; "
        f"name one of them {' or '.join(known)}"
    )


def _from_table(path: Path) -> list[Sample]:
    """A row is a sample; the columns are those of the first row.

    Raises:
        UserError: the file is no table, or lacks a column.
    """
    samples: list[Sample] = []
    clip_column = caption_column = None
    for number, row in _table_rows(path):
        if clip_column is None:
            clip_column = _column(path, CLIP_COLUMNS, row, what="clip")
            caption_column = _column(path, CAPTION_COLUMNS, row, what="caption")
            logger.info("%s: clips from %r, captions from %r", path, clip_column, caption_column)
        name, caption = row.get(clip_column), row.get(caption_column)
        if not isinstance(name, str) or not name.strip():
            samples.append((Path(f"{path}:{number}"), ClipError("the row names no clip")))
            continue
        is_text = isinstance(caption, str) and _is_unicode(caption)
        text = caption.strip() if is_text else ""
        what = "is no text" if caption and not is_text else "is empty"
        reason = ClipError(f"its caption, in {path}:{number}, {what}")
        samples.append((path.parent / name.strip(), text or reason))
    return samples


def _layouts_of(folder: Path) -> list[tuple[str, Callable[[], list[Sample]]]]:
    """Name and reader of every layout that `folder` has, the one to be used first."""
    clips = find_clips(folder)
    in_videos = [clip for clip in clips if "videos" in clip.relative_to(folder).parts[:-1]]
    labelled = [clip for clip in in_videos if os.path.exists(label_path(clip, folder))]
    beside = [clip for clip in clips if os.path.isfile(clip.with_suffix(".txt"))]
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    lists = [folder / name for name in PROMPT_LISTS if (folder / name).is_file()]

    def from_labels() -> list[Sample]:
        return [(clip, read_caption(label_path(clip, folder))) for clip in in_videos]

    def from_neighbours() -> list[Sample]:
        return [(clip, read_caption(clip.with_suffix(".txt"))) for clip in clips]

    found: list[tuple[str, Callable[[], list[Sample]]]] = []
    if labelled:
        found.append(("videos/ and labels/", from_labels))
    found += [(table.name, partial(_from_table, table)) for table in tables]
    videos = folder / VIDEO_LIST
    if videos.is_file():
        for prompts in lists:
            names = f"{prompts.name} and {VIDEO_LIST}"
            found.append((names, partial(_from_lists, prompts, videos)))
    if beside:
        found.append(("captions beside the clips", from_neighbours))
    if not found and clips:  # no caption at all, which the reader says of each clip
        found.append(("", from_labels if in_videos else from_neighbours))
    return found


def find_samples(folder: Path) -> list[Sample]:
    """All clips that `folder` names or holds, each with its caption or why it has none.

    Raises:
        UserError: there is no such folder, or a file that lists clips is wrong.
    """
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise UserError(f"data folder {folder} {what}; a folder must hold {LAYOUTS}")
    try:
        os.listdir(folder)
    except OSError as error:
        raise UserError(
            f"data folder {folder} cannot be read ({error.strerror}); check its permissions"
        ) from None
    found = _layouts_of(folder)
    if len(found) > 1:
        others = ", ".join(name for name, _ in found[1:])
        logger.warning("%s: captions are taken from %s, not from %s", folder, found[0][0], others)
    return found[0][1]() if found else []
