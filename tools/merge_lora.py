"""Merge LoRAs into a base model and write full weights in SAT's layout.

    python tools/merge_lora.py --load BASE --lora PATH[:SCALE] … --output_path DIR [--fp16|--bf16]

This writes ``DIR/latest`` and ``DIR/1000/mp_rank_00_model_states.pt``; name DIR in ``load:``. The
file of an older LoRA run contains the base model too, so it may be given as both BASE and PATH.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, add_precision, run_and_exit, set_up_logging
from sgm.config import lora_from_text
from sgm.files import expanded, new_folder, refuse_existing

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, merge, print what was written, and return the exit code.

    Raises:
        UserError: a file is invalid, a LoRA belongs to another model, or the output exists or
            cannot be written.
    """
    parser = CommandParser(description="Merge LoRAs into a base model.")
    note = "the base model: a folder or file in SAT's layout, or a diffusers folder"
    parser.add_argument("--load", required=True, metavar="BASE", help=note)
    loras = {"nargs": "+", "required": True, "type": lora_from_text, "metavar": "PATH[:SCALE]"}
    note = "LoRAs of SAT, diffusers or peft; SCALE 1: strength as trained"
    parser.add_argument("--lora", **loras, help=note)
    add_option(parser, "output_path", required=True, metavar="DIR", help="the new folder")
    add_precision(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    refuse_existing(expanded(args.output_path))
    import torch

    from sgm.checkpoint.lora import merged_tensors
    from sgm.checkpoint.transformer import read_transformer
    from tools.weights.writing import save_sat_transformer

    path, base, own = read_transformer(args.load, option="--load")
    if own:
        logger.warning("%s contains LoRA matrices; they are merged only if --lora names it", path)
    dtype = args.dtype and getattr(torch, args.dtype)
    merged = merged_tensors(base, args.lora, where=path, dtype=dtype)
    with new_folder(args.output_path) as folder:
        save_sat_transformer(folder, merged)
    print(f"wrote {args.output_path}; to make videos with it: --load {quote(args.output_path)}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
