"""A base model with LoRAs merged into it, as full weights in SAT's layout.

    python tools/merge_lora.py --load BASE --lora PATH[:SCALE] … --output_path DIR [--fp16|--bf16]

Writes ``DIR/latest`` and ``DIR/1000/mp_rank_00_model_states.pt``, for ``load:``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, add_precision, run_and_exit, set_up_logging
from sgm.config import LoraChoice, lora_from_text
from sgm.files import new_folder, refuse_existing

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def merge_lora(
    load: str | Path,
    loras: Sequence[LoraChoice],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the weights in `load` with `loras` added to the new `folder`, in SAT's layout.

    Args:
        load: the base model, of SAT or diffusers. An older LoRA run's file, which holds the base
            model too, may be both this and one of `loras`.
        loras: what to add, and how strongly.
        folder: must not exist.
        dtype: of what is written; None keeps the base model's.

    Raises:
        UserError: a file is not what it must be, a LoRA belongs to another model, or `folder`
            exists or cannot be written.
    """
    from sgm.checkpoint.lora import merged_tensors
    from sgm.checkpoint.transformer import read_transformer
    from tools.weights.writing import save_sat_transformer

    refuse_existing(Path(folder).expanduser())
    path, base, own = read_transformer(load, option="--load")
    if own:
        logger.warning("%s also holds LoRA matrices; they are merged if --lora names it too", path)
    merged = merged_tensors(base, loras, where=path, dtype=dtype)
    with new_folder(folder) as made:
        save_sat_transformer(made, merged)


def build_parser() -> CommandParser:
    """The parser of this command."""
    parser = CommandParser(description="Merge LoRAs into a base model.")
    parser.add_argument(
        "--load",
        required=True,
        metavar="BASE",
        help="the base model: a folder or file of SAT, or a folder of diffusers",
    )
    parser.add_argument(
        "--lora",
        required=True,
        nargs="+",
        type=lora_from_text,
        metavar="PATH[:SCALE]",
        help="LoRAs of SAT, diffusers or peft; a scale of 1 is as trained",
    )
    add_option(parser, "output_path", required=True, metavar="DIR", help="the new folder")
    add_precision(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, merge, say what was written; returns the exit code."""
    args = build_parser().parse_args(argv)
    set_up_logging()
    import torch

    dtype = args.dtype and getattr(torch, args.dtype)
    merge_lora(args.load, args.lora, args.output_path, dtype=dtype)
    print(f"wrote {args.output_path}; for videos: --load {quote(args.output_path)}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
