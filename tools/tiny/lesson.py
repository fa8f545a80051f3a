"""A dataset that teaches CogVideoX-tiny a new subject.

A kite is a magenta triangle: the word is new to the model and stands for both colour and shape. The
dataset has three times as many clips of known subjects as of kites, so that the model does not
forget the known subjects. Some combinations of direction and background are not used for training;
they are used in the prompts after training.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from sgm.files import new_folder
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
# Direction and background in the prompts after training: each direction once, each background.
ASKED = (("left", "black"), ("right", "white"), ("up", "gray"), ("down", "black"))

_SEED = 5


def name_subject(caption: str) -> str:
    """Replace the subject's colour and shape in a caption by the subject's word."""
    return caption.replace(f"{COLOR} {SHAPE}", SUBJECT)


def parse_prompt(prompt: str) -> ShapeSpec:
    """Return the attributes in a prompt that names the subject.

    Raises:
        ValueError: an attribute is missing or given twice, as for `parse_caption`.
    """
    return parse_caption(prompt.replace(SUBJECT, f"{COLOR} {SHAPE}"))


class SubjectClips(ShapeClips):
    """Clips of the subject, with the subject's word in their captions.

    Args:
        num_clips, seed: as for `ShapeClips`.
        asked: true: draw only combinations in `ASKED`; false: draw only other combinations.
    """

    def __init__(self, num_clips: int, seed: int, *, asked: bool) -> None:
        pairs = itertools.product(DIRECTIONS, BACKGROUNDS)
        chosen = ASKED if asked else [pair for pair in pairs if pair not in ASKED]
        specs = [ShapeSpec(COLOR, SHAPE, *pair) for pair in chosen]
        super().__init__(num_clips, seed, combinations=specs)

    def caption(self, index: int) -> str:
        """Return the caption of clip `index`. Raises IndexError."""
        return name_subject(super().caption(index))


def prompts() -> list[str]:
    """Return the 16 prompts to render after training: each pair of `ASKED` in each wording."""
    specs = [ShapeSpec(COLOR, SHAPE, *pair) for pair in ASKED]
    return [name_subject(s.caption(wording)) for wording in range(len(WORDINGS)) for s in specs]


def draw_dataset(
    folder: Path,
    *,
    num_new: int = NUM_NEW,
    num_known: int = NUM_KNOWN,
    num_valid: int = NUM_VALID,
) -> None:
    """Draw ``new``, ``known`` and ``valid`` in `folder`, each in the layout of fine-tuning data.

    Training uses ``new``, which has clips of the subject, and ``known``, which has clips of what
    the model was trained on before. ``valid`` has clips of the subject with the combinations in
    `prompts`. `folder` is only created once all clips are complete.

    Raises:
        UserError: `folder` exists, or a file cannot be written.
    """
    parts = {
        "new": SubjectClips(num_new, _SEED, asked=False),
        "known": ShapeClips(num_known, _SEED + 1, combinations=training_combinations()),
        "valid": SubjectClips(num_valid, _SEED + 2, asked=True),
    }
    with new_folder(folder) as partial:
        for name, clips in parts.items():
            write_clips(clips, partial / name)
