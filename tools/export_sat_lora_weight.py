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
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, run_and_exit, set_up_logging
from sgm.files import make_output_folder, new_folder, refuse_existing, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sgm.checkpoint.lora import LoraRecord


logger = logging.getLogger(__name__)


def adapter_metadata(record: LoraRecord, alpha: float, names: Sequence[str]) -> dict[str, str]:
    """The safetensors metadata that diffusers writes for a transformer's LoRA with these settings.

    diffusers hands the settings to peft's LoraConfig. Layers are named in full, so that a LoRA of
    a few blocks stays on these. The base model's fingerprint, where it is known, is added under a
    key that diffusers does not read.

    Args:
        record: tells the rank and the base model.
        alpha: the update is ``alpha / r · B A``.
        names: of the matrices in diffusers.
    """
    from sgm.checkpoint.lora_formats import BASE_KEY, DIFFUSERS_PREFIX, METADATA_KEY

    settings: dict[str, Any] = {
        "r": record.r,
        # peft declares a whole number and takes any.
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in names}),
    }
    prefixed = {f"{DIFFUSERS_PREFIX}{name}": value for name, value in settings.items()}
    base = {} if record.base is None else {BASE_KEY: record.base}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True)}
    return metadata | base


def export_lora(path: str | Path, folder: str | Path, *, alpha: float | None = None) -> Path:
    """Write the LoRA of SAT format in `path` to a file in `folder`, as diffusers names it.

    Args:
        path: as in `sgm.checkpoint.read_lora`.
        folder: is made if it is not there.
        alpha: lora_alpha, where the file does not tell it; without it SAT's default, 1, is taken.

    Returns:
        The file.

    Raises:
        UserError: `path` holds no LoRA, or not all of one; the file exists, or cannot be written.
    """
    from sgm.checkpoint.find import DIFFUSERS_FILE, find_lora
    from sgm.checkpoint.lora import alpha_of, check_whole_lora, is_sat_lora, read_lora
    from sgm.checkpoint.lora_formats import DIFFUSERS_PREFIX
    from sgm.checkpoint.table import to_diffusers
    from tools.weights.writing import own_storage

    folder = Path(os.path.expanduser(folder))
    refuse_existing(folder / DIFFUSERS_FILE)
    lora = find_lora(path, option="--sat_pt_path")
    matrices, record = read_lora(lora, alpha=alpha, option="--sat_pt_path")
    check_whole_lora(matrices, record, path)
    if not is_sat_lora(lora):
        logger.info("%s is in diffusers' or peft's format already; it is written anew", path)
    tensors = to_diffusers(matrices, "lora", where=path)
    metadata = adapter_metadata(record, alpha_of(record, path), list(tensors))
    prefixed = {f"{DIFFUSERS_PREFIX}{name}": own_storage(tensors[name]) for name in tensors}
    with _new_file(folder, DIFFUSERS_FILE) as file:
        _save_safetensors(prefixed, file, metadata)
    return folder / DIFFUSERS_FILE


@contextmanager
def _new_file(folder: Path, name: str) -> Iterator[Path]:
    """A path to write to, which becomes the file `name` in a folder that is there or is made."""
    if os.path.lexists(folder):
        with replacing(make_output_folder(folder) / name) as partial:
            yield partial
    else:
        with new_folder(folder) as made:
            yield made / name


def _save_safetensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"safetensors: {error}") from error


def build_parser() -> CommandParser:
    """The parser of this command."""
    parser = CommandParser(description="Export a LoRA of SAT format for diffusers.")
    add_option(
        parser,
        "sat_pt_path",
        required=True,
        metavar="PATH",
        help="a LoRA run's folder, that of one of its checkpoints, or a file",
    )
    add_option(
        parser,
        "lora_save_directory",
        required=True,
        metavar="DIR",
        help="folder for pytorch_lora_weights.safetensors",
    )
    add_option(
        parser,
        "lora_alpha",
        type=float,
        metavar="X",
        help="of an older file, which does not tell it (default then: 1, as in SAT)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, say what to do with it; returns the exit code."""
    args = build_parser().parse_args(argv)
    set_up_logging()
    file = export_lora(args.sat_pt_path, args.lora_save_directory, alpha=args.lora_alpha)
    print(f"wrote {file}; in diffusers: pipe.load_lora_weights({str(file.parent)!r})")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
