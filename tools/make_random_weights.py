"""Random weights for a configuration, written where it expects the real ones.

Speed and memory of a model do not depend on its weights, so this tells what a model needs before
anything is downloaded:

    python tools/make_random_weights.py --base configs/cogvideox_2b_infer.yaml --t5-layers 1
    bash inference.sh configs/cogvideox_2b_infer.yaml

The files have the published layout, with the Python objects that training leaves beside
the tensors.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from arguments import parse_config
from sgm.checkpoint.find import MODEL_FILES
from sgm.checkpoint.tensors import LazyTensors
from sgm.checkpoint.transformer import MODEL_PREFIX, POSITION_TABLE
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import Config, SamplingArgs
from sgm.errors import UserError
from sgm.files import make_output_folder, new_folder, refuse_existing, save_torch, write_torch
from sgm.preflight import check_model_section, weight_paths
from sgm.util import instantiate_from_config
from tools.bench.measuring import choose_device, fill_random
from tools.weights.writing import save_sharded

logger = logging.getLogger(__name__)

_TAG = "1000"
_VOCABULARY = 32128  # of T5 v1.1, in all sizes
XXL_LAYERS = 24


def random_tensor(name: str, shape: torch.Size, *, dtype: torch.dtype) -> Tensor:
    """A tensor on the host, drawn on a GPU where there is one, which is faster."""
    tensor = torch.empty(shape, dtype=dtype, device=choose_device())
    fill_random(name, tensor)
    return tensor.cpu()


def random_state(module: nn.Module, *, dtype: torch.dtype) -> LazyTensors:
    """Random tensors of the names and shapes of a module, which may be on the meta device."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return LazyTensors(
        {name: partial(random_tensor, name, shapes[name], dtype=dtype) for name in shapes},
        meta=lambda: {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()
        },
    )


def write_transformer(network_config: Mapping[str, Any], load: Path) -> None:
    """``{load}/latest`` and the file it leads to, in float16 and without the position table."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    with torch.device("meta"):
        network = instantiate_from_config(network_config)
    state = random_state(network, dtype=torch.float16)
    beside = {
        "iteration": int(_TAG),
        "loss_scaler": LossScaler(1.0),
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "args": argparse.Namespace(mode="pretrain"),
    }
    with new_folder(load) as folder:
        (folder / _TAG).mkdir()
        module = {MODEL_PREFIX + name: state[name] for name in state if name != POSITION_TABLE}
        write_torch({"module": module, **beside}, folder / _TAG / MODEL_FILES[0])
        (folder / "latest").write_text(_TAG, encoding="utf-8")


def write_vae(first_stage_config: Mapping[str, Any], path: Path) -> None:
    """``{"state_dict": …}`` in float32."""
    params = {k: v for k, v in first_stage_config["params"].items() if k != "ckpt_path"}
    with torch.device("meta"):
        vae = instantiate_from_config({**first_stage_config, "params": params})
    make_output_folder(path.parent)
    save_torch({"state_dict": dict(random_state(vae, dtype=torch.float32))}, path)


def write_t5(
    folder: Path, *, width: int, num_layers: int, dtype: torch.dtype = torch.float16
) -> None:
    """A T5 v1.1 encoder of XXL's proportions, and a tokenizer of single bytes and a few words.

    Tensors are drawn and written one by one: XXL's 9.5 GB are never in memory together.
    """
    from sentencepiece import SentencePieceTrainer
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=_VOCABULARY, d_model=width, d_kv=64, d_ff=width * 5 // 2,
        num_heads=max(width // 64, 1), num_layers=num_layers, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
    del encoder.encoder.embed_tokens  # `shared` under another name
    with new_folder(folder) as partial_folder:
        words = partial_folder / "words.txt"
        words.write_text("a red circle moving left on a black background\n" * 50, encoding="utf-8")
        SentencePieceTrainer.train(
            input=str(words), model_prefix=str(partial_folder / "spiece"), vocab_size=300,
            bos_id=-1, pad_id=0, eos_id=1, unk_id=2, hard_vocab_limit=False, byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
        words.unlink()
        (partial_folder / "spiece.vocab").unlink()
        config.save_pretrained(partial_folder)
        save_sharded(partial_folder, random_state(encoder, dtype=dtype), stem="model")


def write_weights(
    model: Mapping[str, Any],
    *,
    load: Path,
    vae: Path,
    t5: Path,
    t5_layers: int = XXL_LAYERS,
    t5_dtype: torch.dtype = torch.float16,
) -> None:
    """All parts of a `model` section, to paths that do not exist; each appears when it is whole.

    Raises:
        UserError: one cannot be written.
    """
    patches = model["network_config"]["params"]["modules"]["patch_embed_config"]["params"]
    logger.info("writing the transformer to %s", load)
    write_transformer(model["network_config"], load)
    logger.info("writing the autoencoder to %s", vae)
    write_vae(model["first_stage_config"], vae)
    logger.info("writing T5 with %d layers to %s", t5_layers, t5)
    write_t5(t5, width=patches["text_hidden_size"], num_layers=t5_layers, dtype=t5_dtype)


def paths_of(config: Config) -> dict[str, Path]:
    """Where a configuration expects its weights; keywords of `write_weights`.

    Raises:
        UserError: it does not name each of them, or not exactly one T5.
    """
    check_model_section(config.model)
    load = config.args.load
    if not load:
        raise UserError("args.load is not set: it must be the path to write the weights to")
    vae, *texts = weight_paths(config.model)
    vae = Path(vae.path()).expanduser()
    folders = [Path(text.path()).expanduser() for text in texts]
    if len(folders) != 1:
        raise UserError(
            f"model.conditioner_config has {len(folders)} T5 embedders; random weights are for one"
        )
    return {"load": Path(load).expanduser(), "vae": vae, "t5": folders[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Write all three; refuse to touch what exists."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", nargs="+", required=True, help="configurations, merged in order")
    parser.add_argument("--t5-layers", type=int, default=XXL_LAYERS, help="default: XXL's number")
    options = parser.parse_args(argv)
    if options.t5_layers < 1:
        raise UserError("--t5-layers must be at least 1")
    set_up_logging()
    config = parse_config(SamplingArgs, "", ["--base", *options.base])
    paths = paths_of(config)
    for path in paths.values():
        refuse_existing(path)
    torch.manual_seed(config.args.seed)
    write_weights(config.model, **paths, t5_layers=options.t5_layers)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
