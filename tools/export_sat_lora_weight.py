"""Export a LoRA that was trained here to diffusers, for ``pipe.load_lora_weights(DIR)``.

    python tools/export_sat_lora_weight.py --sat_pt_path ckpts/RUN --lora_save_directory DIR

This writes ``DIR/pytorch_lora_weights.safetensors``. The file's metadata contains rank and alpha,
which diffusers 0.35 or later reads to apply the LoRA at its trained strength.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, run_and_exit, set_up_logging
from sgm.files import expanded, make_output_folder, new_folder, refuse_existing, replacing

if TYPE_CHECKING:
    from sgm.checkpoint.lora import LoraRecord


logger = logging.getLogger(__name__)


def adapter_metadata(record: LoraRecord, alpha: float, names: Sequence[str]) -> dict[str, str]:
    """Return the safetensors metadata that diffusers writes for a transformer's LoRA.

    diffusers passes these settings to peft's LoraConfig. Layers are listed by their full names, so
    a LoRA of a few blocks changes only these blocks. The base model's fingerprint, if it is known,
    is added under a key that diffusers ignores.

    Args:
        record: provides the rank and the base model's fingerprint.
        alpha: lora_alpha; the update of a weight is ``alpha / r · B A``.
        names: the names of the matrices in diffusers.
    """
    from sgm.checkpoint.lora_formats import BASE_KEY, DIFFUSERS_PREFIX, METADATA_KEY

    settings: dict[str, Any] = {
        "r": record.r,
        # peft declares an int, but accepts any number.
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in names}),
    }
    prefixed = {f"{DIFFUSERS_PREFIX}{name}": value for name, value in settings.items()}
    base = {} if record.base is None else {BASE_KEY: record.base}
    return {METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True), **base}


def export_lora(path: str, folder: Path, *, alpha: float | None) -> Path:
    """Write the LoRA in SAT's format in `path` to `folder`, under diffusers' file name.

    Args:
        path: a file or folder, as for `sgm.checkpoint.lora.read_lora`.
        folder: created if it does not exist.
        alpha: the lora_alpha of a file that does not store it; None means 1, SAT's default.

    Returns:
        The path of the written file.

    Raises:
        UserError: `path` contains no LoRA or an incomplete LoRA, or the output file exists or
            cannot be written.
    """
    from sgm.checkpoint.find import DIFFUSERS_FILE, find_lora
    from sgm.checkpoint.lora import alpha_of, check_whole_lora, read_lora
    from sgm.checkpoint.lora_formats import DIFFUSERS_PREFIX
    from sgm.checkpoint.table import to_diffusers
    from tools.weights.writing import own_storage, save_safetensors

    refuse_existing(folder / DIFFUSERS_FILE)
    lora = find_lora(path, option="--sat_pt_path")
    matrices, record = read_lora(lora, alpha=alpha, option="--sat_pt_path")
    check_whole_lora(matrices, record, path)
    tensors = to_diffusers(matrices, "lora", where=path)
    metadata = adapter_metadata(record, alpha_of(record, path), list(tensors))
    prefixed = {f"{DIFFUSERS_PREFIX}{name}": own_storage(tensors[name]) for name in tensors}
    with _new_file(folder, DIFFUSERS_FILE) as file:
        save_safetensors(prefixed, file, metadata)
    return folder / DIFFUSERS_FILE


@contextmanager
def _new_file(folder: Path, name: str) -> Iterator[Path]:
    """Yield a temporary path; rename it to `name` in `folder` (created if missing) at the end."""
    if os.path.lexists(folder):
        with replacing(make_output_folder(folder) / name) as partial:
            yield partial
    else:
        with new_folder(folder) as made:
            yield made / name


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, export, print how to load the LoRA, and return the exit code."""
    parser = CommandParser(description="Export a LoRA in SAT's format to diffusers.")
    note = "the folder of a LoRA run or of its checkpoint, or a file"
    add_option(parser, "sat_pt_path", required=True, metavar="PATH", help=note)
    note = "the folder to write pytorch_lora_weights.safetensors to"
    add_option(parser, "lora_save_directory", required=True, metavar="DIR", help=note)
    note = "lora_alpha of an older file, which does not store it (default: 1, as in SAT)"
    add_option(parser, "lora_alpha", type=float, metavar="X", help=note)
    args = parser.parse_args(argv)
    set_up_logging()
    folder = expanded(args.lora_save_directory)
    file = export_lora(args.sat_pt_path, folder, alpha=args.lora_alpha)
    print(f"wrote {file}; in diffusers: pipe.load_lora_weights({str(file.parent)!r})")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
