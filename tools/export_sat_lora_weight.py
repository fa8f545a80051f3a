"""A LoRA that was trained here, for diffusers: ``pipe.load_lora_weights(DIR)`` gives its strength.

    python tools/export_sat_lora_weight.py --sat_pt_path ckpts/RUN --lora_save_directory DIR

Writes ``DIR/pytorch_lora_weights.safetensors`` with rank and alpha in its metadata, which diffusers
reads from release 0.35 on.
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
from sgm.files import make_output_folder, new_folder, refuse_existing, replacing

if TYPE_CHECKING:
    from sgm.checkpoint.lora import LoraRecord


logger = logging.getLogger(__name__)


def adapter_metadata(record: LoraRecord, alpha: float, names: Sequence[str]) -> dict[str, str]:
    """The safetensors metadata that diffusers writes for a transformer's LoRA with these settings.

    diffusers passes the settings to peft's LoraConfig. Layers are named in full, so that a LoRA of
    a few blocks changes only these. The base model's fingerprint, if it is known, is added under a
    key that diffusers does not read.

    Args:
        record: has the rank and the base model.
        alpha: the update is ``alpha / r · B A``.
        names: of the matrices in diffusers.
    """
    from sgm.checkpoint.lora_formats import BASE_KEY, DIFFUSERS_PREFIX, METADATA_KEY

    settings: dict[str, Any] = {
        "r": record.r,
        # peft's type is int, but it accepts any number.
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in names}),
    }
    prefixed = {f"{DIFFUSERS_PREFIX}{name}": value for name, value in settings.items()}
    base = {} if record.base is None else {BASE_KEY: record.base}
    return {METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True), **base}


def export_lora(path: str, folder: Path, *, alpha: float | None) -> Path:
    """Write the LoRA of SAT format in `path` to a file in `folder`, with diffusers' name for it.

    Args:
        path: as in `sgm.checkpoint.lora.read_lora`.
        folder: is created if it does not exist.
        alpha: lora_alpha for a file that does not store it; None takes SAT's default, 1.

    Returns:
        The path of the file.

    Raises:
        UserError: `path` holds no LoRA, or a part of one; the file exists, or cannot be written.
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
    """A path to write to, which becomes the file `name` in a folder that exists or is created."""
    if os.path.lexists(folder):
        with replacing(make_output_folder(folder) / name) as partial:
            yield partial
    else:
        with new_folder(folder) as made:
            yield made / name


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, print how to load it; returns the exit code."""
    parser = CommandParser(description="Export a LoRA of SAT format for diffusers.")
    note = "a LoRA run's folder, that of one of its checkpoints, or a file"
    add_option(parser, "sat_pt_path", required=True, metavar="PATH", help=note)
    note = "folder for pytorch_lora_weights.safetensors"
    add_option(parser, "lora_save_directory", required=True, metavar="DIR", help=note)
    note = "for an older file, which does not store it (default: 1, as in SAT)"
    add_option(parser, "lora_alpha", type=float, metavar="X", help=note)
    args = parser.parse_args(argv)
    set_up_logging()
    folder = Path(os.path.expanduser(args.lora_save_directory))
    file = export_lora(args.sat_pt_path, folder, alpha=args.lora_alpha)
    print(f"wrote {file}; in diffusers: pipe.load_lora_weights({str(file.parent)!r})")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
