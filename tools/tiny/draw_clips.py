"""Draw a folder of clips in the layout of fine-tuning data: videos/N.mp4 and labels/N.txt.

    python -m tools.tiny.draw_clips --output data/shapes --count 200

Use these clips to try fine-tuning; the bundled model was trained on clips drawn on the fly.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.files import make_output_folder, new_folder, replacing
from sgm.video import write_mp4
from tools.tiny.shapes import FPS, ShapeClips

logger = logging.getLogger(__name__)


def write_clips(clips: ShapeClips, folder: Path) -> None:
    """Write clip N as ``videos/N.mp4`` (H.264, yuv420p, 8 fps) and its caption as ``labels/N.txt``.

    Raises:
        UserError: a file cannot be written.
    """
    videos, labels = make_output_folder(folder / "videos"), make_output_folder(folder / "labels")
    for index in range(len(clips)):
        frames, caption = clips.draw(index)
        write_mp4([frames], videos / f"{index}.mp4", fps=FPS)
        with replacing(labels / f"{index}.txt") as partial:
            partial.write_text(f"{caption}\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the clips; raise an error if --output exists."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="each seed draws different clips")
    parser.add_argument(
        "--held-out", action="store_true", help="draw combinations not used in training"
    )
    options = parser.parse_args(argv)
    set_up_logging()
    clips = ShapeClips(options.count, options.seed, held_out=options.held_out)
    with new_folder(options.output) as folder:
        write_clips(clips, folder)
    logger.info("wrote %d clips to %s", options.count, options.output)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
