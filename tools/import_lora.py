"""Convert a LoRA of diffusers or peft to SAT's layout.

    python tools/import_lora.py --lora_path LORA --output_path DIR [--load BASE]

This writes ``DIR/latest`` and ``DIR/1/mp_rank_00_model_states.pt``, like a LoRA run. Name DIR in
``lora:`` (which also accepts the original LoRA of diffusers).
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, run_and_exit, set_up_logging
from sgm.files import expanded, new_folder, refuse_existing

logger = logging.getLogger(__name__)

TAG = "1"


def import_lora(path: str, folder: str, *, alpha: float | None, load: str | None) -> str:
    """Write the LoRA in `path`, with its record, to the new `folder` in SAT's layout.

    Args:
        path: a file or folder, as for `sgm.checkpoint.lora.read_lora`.
        folder: the output folder, which must not exist.
        alpha: the lora_alpha of a file that does not store it; None means the rank.
        load: the base model, in the format of SAT or diffusers. The LoRA's shapes are compared with
            it, and its fingerprint is stored in the record.

    Returns:
        A text that says what was written and how to use it.

    Raises:
        UserError: `path` contains no LoRA, a LoRA that SAT cannot represent, or a LoRA of another
            model; or `folder` exists or cannot be written.
    """
    from sgm.checkpoint.find import find_lora
    from sgm.checkpoint.lora import check_matrices, check_whole_lora, read_lora
    from sgm.checkpoint.tensors import on_meta
    from sgm.checkpoint.transformer import fingerprint, read_transformer
    from tools.weights.writing import save_sat_transformer

    refuse_existing(expanded(folder))
    lora = find_lora(path, option="--lora_path")
    matrices, record = read_lora(lora, alpha=alpha, option="--lora_path")
    check_whole_lora(matrices, record, path)
    if load is not None:
        found, base, _ = read_transformer(load, option="--load")
        check_matrices(matrices, record, on_meta(base), path=path, model=str(found))
        record = dataclasses.replace(record, base=fingerprint(base))
    with new_folder(folder) as made:
        save_sat_transformer(made, matrices, tag=TAG, lora=dataclasses.asdict(record))
    strength = "unknown" if record.lora_alpha is None else f"{record.lora_alpha:g}"
    use = f"--lora {quote(folder)}"
    return (
        f"wrote {folder}: rank {record.r}, lora_alpha {strength}; to make videos with it: {use}\n"
        "to train from it, merge it and set load: NEW: python tools/merge_lora.py --load "
        f"{'BASE' if load is None else quote(load)} {use} --output_path NEW"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, import, print what was written, and return the exit code."""
    parser = CommandParser(description="Import a LoRA of diffusers or peft into SAT's layout.")
    note = "pytorch_lora_weights.safetensors, its folder, or a folder that peft saved"
    add_option(parser, "lora_path", required=True, metavar="PATH", help=note)
    add_option(parser, "output_path", required=True, metavar="DIR", help="the new folder")
    note = "lora_alpha of a file that does not store it (default: the rank, as in diffusers)"
    add_option(parser, "lora_alpha", type=float, metavar="X", help=note)
    note = "the base model; shapes are compared, and its fingerprint is stored with the LoRA"
    parser.add_argument("--load", metavar="BASE", help=note)
    args = parser.parse_args(argv)
    set_up_logging()
    print(import_lora(args.lora_path, args.output_path, alpha=args.lora_alpha, load=args.load))
    return 0


if __name__ == "__main__":
    run_and_exit(main)
