"""Export a training run to the bundled folder: the transformer in float16 and T5's weights.

    python -m tools.tiny.export --load ckpts/tiny-… --output CogVideoX-tiny-sat

--output must contain the T5 folder that the run started from (see tools/tiny/make_t5.py). It must
not contain a transformer yet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sgm.checkpoint.find import find_transformer
from sgm.checkpoint.transformer import MODEL_PREFIX, POSITION_TABLE
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.errors import UserError
from sgm.files import new_folder, replacing
from tools.weights.writing import save_safetensors, save_sat_transformer

logger = logging.getLogger(__name__)

T5_PREFIX = "conditioner.embedders.0.transformer."


def write_transformer(state: Mapping[str, Tensor], folder: Path, *, tag: str) -> None:
    """Write ``{folder}/{tag}/mp_rank_00_model_states.pt`` in float16, and ``{folder}/latest``.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    tensors = {
        name.removeprefix(MODEL_PREFIX): tensor.half()
        for name, tensor in state.items()
        if name.startswith(MODEL_PREFIX) and name != MODEL_PREFIX + POSITION_TABLE
    }
    with new_folder(folder) as partial:
        save_sat_transformer(partial, tensors, tag=tag)
    logger.info("wrote %s", folder)


def write_t5(state: Mapping[str, Tensor], path: Path) -> None:
    """Replace the weights in a T5 file with the trained weights of the same names.

    Raises:
        UserError: the run did not train T5, or trained a different T5 model.
    """
    # Tied weights have two names in a checkpoint and one in the T5 file.
    names = sorted(load_file(path))
    if any(T5_PREFIX + name not in state for name in names):
        raise UserError(f"the run contains no T5 weights for {path}; train with is_trainable: true")
    with replacing(path) as partial:
        save_safetensors({name: state[T5_PREFIX + name].contiguous() for name in names}, partial)
    logger.info("wrote %s", path)


def main() -> int:
    """Write the transformer and the T5 weights of the run."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, help="folder or weight file of the run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tag", default="1000", help="name of the folder inside transformer/")
    options = parser.parse_args()
    set_up_logging()
    state = find_transformer(options.load).file.tensors()
    write_transformer(state, options.output / "transformer", tag=options.tag)
    write_t5(state, options.output / "t5" / "model.safetensors")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
