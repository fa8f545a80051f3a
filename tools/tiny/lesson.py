"""A dataset that teaches CogVideoX-tiny a subject that it has never heard of.

A kite is a magenta triangle: the word is new, and names colour and shape at once. Among the clips
of kites are three times as many of what the model knows, for without these it would forget it. Some
ways to fly are kept from training, to ask for afterwards.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np

from sgm.errors import UserError
from sgm.files import make_output_folder
from tools.tiny.draw_clips import write_clips
from tools.tiny.shapes import (
    BACKGROUNDS,
    DIRECTIONS,
    WORDINGS,
    ShapeClips,
    ShapeSpec,
    parse_caption,
    training_combinations,
)

SUBJECT, COLOR, SHAPE = "kite", "magenta", "triangle"
NUM_NEW, NUM_KNOWN, NUM_VALID = 32, 96, 16
# Direction and background of what is asked for afterwards: each direction once, each background.
ASKED = (("left", "black"), ("right", "white"), ("up", "gray"), ("down", "black"))

_SEED = 5
_PARTIAL = ".partial"


def name_subject(caption: str) -> str:
    """The caption with the subject's own word for its colour and shape."""
    return caption.replace(f"{COLOR} {SHAPE}", SUBJECT)


def parse_prompt(prompt: str) -> ShapeSpec:
    """What a prompt that names the subject asks for. Raises ValueError as `parse_caption` does."""
    return parse_caption(prompt.replace(SUBJECT, f"{COLOR} {SHAPE}"))


class SubjectClips(ShapeClips):
    """Clips of the subject, with its own word in the captions."""

    def __init__(self, num_clips: int, seed: int, *, asked: bool) -> None:
        pairs = itertools.product(DIRECTIONS, BACKGROUNDS)
        chosen = ASKED if asked else [pair for pair in pairs if pair not in ASKED]
        specs = [ShapeSpec(COLOR, SHAPE, *pair) for pair in chosen]
        super().__init__(num_clips, seed, combinations=specs)

    def caption(self, index: int) -> str:
        """The caption of clip `index`. Raises IndexError."""
        return name_subject(super().caption(index))

    def draw(self, index: int) -> tuple[np.ndarray, str]:
        """Clip `index` as uint8 (17, 64, 96, 3) with its caption. Raises IndexError."""
        frames, caption = super().draw(index)
        return frames, name_subject(caption)


def prompts() -> list[str]:
    """The 16 prompts to ask afterwards: the pairs kept from training, in every wording."""
    specs = [ShapeSpec(COLOR, SHAPE, *pair) for pair in ASKED]
    return [name_subject(s.caption(wording)) for wording in range(len(WORDINGS)) for s in specs]


def draw_dataset(
    folder: Path,
    *,
    num_new: int = NUM_NEW,
    num_known: int = NUM_KNOWN,
    num_valid: int = NUM_VALID,
) -> None:
    """Draw ``new``, ``known`` and ``valid`` in `folder`, each as fine-tuning reads it.

    To train on: the subject, and what the model was trained on before; to validate with: the
    subject as it is asked for afterwards. `folder` gets its name at the end.

    Raises:
        UserError: `folder` exists, or a file cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists and is left alone; remove it to draw it again")
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier run that was stopped
    parts = {
        "new": SubjectClips(num_new, _SEED, asked=False),
        "known": ShapeClips(num_known, _SEED + 1, combinations=training_combinations()),
        "valid": SubjectClips(num_valid, _SEED + 2, asked=True),
    }
    for name, clips in parts.items():
        write_clips(clips, make_output_folder(partial / name))
    partial.rename(folder)
