"""Export a training run to the bundled folder: the transformer in float16 and T5's weights.

    python -m tools.tiny.export --load ckpts/tiny-… --output CogVideoX-tiny-sat

--output must hold the T5 folder that the run started from (see tools/tiny/make_t5.py).
"""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sgm.checkpoint.find import MODEL_FILES, find_transformer
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.transformer import MODEL_PREFIX, POSITION_TABLE
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.errors import UserError
from sgm.files import replacing, save_torch

logger = logging.getLogger(__name__)

T5_PREFIX = "conditioner.embedders.0.transformer."


def write_transformer(state: dict[str, Tensor], folder: Path, *, tag: str) -> None:
    """Write ``{folder}/{tag}/mp_rank_00_model_states.pt`` and ``{folder}/latest``."""
    module = {
        name: tensor.half()
        for name, tensor in state.items()
        if name.startswith(MODEL_PREFIX) and name != MODEL_PREFIX + POSITION_TABLE
    }
    path = folder / tag / MODEL_FILES[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_torch({"module": module}, path)
    (folder / "latest").write_text(tag, encoding="utf-8")
    logger.info("wrote %s", path)


def write_t5(state: dict[str, Tensor], path: Path) -> None:
    """Replace the weights in a T5 file by trained ones of the same names.

    Raises:
        UserError: the run did not train T5, or trained a different one.
    """
    trained = {n.removeprefix(T5_PREFIX): t for n, t in state.items() if n.startswith(T5_PREFIX)}
    names = set(tensors_of(read_checkpoint(path), path))
    if not names <= set(trained):
        raise UserError(f"the run holds no T5 weights that fit {path}; was its is_trainable true?")
    # Tied weights have two names in a checkpoint and one in the T5 file.
    tensors = {name: trained[name].contiguous() for name in sorted(names)}
    with replacing(path) as partial:
        save_file(tensors, partial, {"format": "pt"})
        partial.chmod(0o644)  # safetensors lets only the owner read
    logger.info("wrote %s", path)


def main() -> int:
    """Write the two parts of the checkpoint."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, help="the run's folder or a file")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tag", default="1000", help="name of the transformer's inner folder")
    options = parser.parse_args()
    set_up_logging()
    state = find_transformer(options.load).file.tensors()
    write_t5(state, options.output / "t5" / "model.safetensors")
    write_transformer(state, options.output / "transformer", tag=options.tag)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
