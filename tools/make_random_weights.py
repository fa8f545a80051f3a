"""Write random weights to the paths where a configuration expects the real weights.

The speed and memory of a model do not depend on the values of its weights. So random weights show
how much time and memory a model needs before anything is downloaded:

    python tools/make_random_weights.py --base configs/cogvideox_2b_infer.yaml --t5-layers 1
    bash inference.sh configs/cogvideox_2b_infer.yaml

The files are written in the layout of the published weights.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from arguments import parse_config
from sgm.checkpoint.tensors import LazyTensors
from sgm.checkpoint.transformer import POSITION_TABLE
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import Config, SamplingArgs
from sgm.errors import UserError
from sgm.files import expanded, make_output_folder, new_folder, refuse_existing, save_torch
from sgm.preflight import check_model_section, weight_paths
from sgm.util import build_on_meta
from tools.bench.measuring import choose_device, fill_random
from tools.weights.writing import save_sat_transformer, save_sharded

logger = logging.getLogger(__name__)

_VOCABULARY = 32128  # the vocabulary size of T5 v1.1, in all model sizes
XXL_LAYERS = 24


def random_tensor(name: str, shape: torch.Size, *, dtype: torch.dtype) -> Tensor:
    """Return a random tensor in host memory; if there is a GPU, draw there because it is faster."""
    tensor = torch.empty(shape, dtype=dtype, device=choose_device())
    fill_random(name, tensor)
    return tensor.cpu()


def random_state(module: nn.Module, *, dtype: torch.dtype) -> LazyTensors:
    """Return random tensors with the names and shapes of `module`, without the position table.

    Each tensor is drawn when it is accessed. The module may be on the meta device.
    """
    metas = {
        name: torch.empty(tensor.shape, dtype=dtype, device="meta")
        for name, tensor in module.state_dict().items()
        if name != POSITION_TABLE
    }
    makers = {name: partial(random_tensor, name, metas[name].shape, dtype=dtype) for name in metas}
    return LazyTensors(makers, meta=metas)


def write_t5(
    folder: Path, *, width: int, num_layers: int, dtype: torch.dtype = torch.float16
) -> None:
    """Write a T5 v1.1 encoder with XXL's proportions, and a tokenizer for bytes and a few words.

    Only one shard is in memory at a time, because T5 XXL has 9.5 GB.
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
    del encoder.encoder.embed_tokens  # tied to `shared`
    with new_folder(folder) as partial_folder:
        with (partial_folder / "spiece.model").open("wb") as tokenizer:
            SentencePieceTrainer.train(
                sentence_iterator=iter(["a red circle moving left on a black background"] * 50),
                model_writer=tokenizer, vocab_size=300, bos_id=-1, pad_id=0, eos_id=1, unk_id=2,
                hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
            )  # fmt: skip
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
    """Write random weights for all parts of a `model` section; only complete parts are visible.

    Args:
        model: the section.
        load, vae, t5: the paths to write to, which must not exist. The transformer is written in
            float16, the autoencoder in float32.
        t5_layers: the number of T5 layers.
        t5_dtype: the dtype of T5.

    Raises:
        UserError: a path cannot be written.
    """
    logger.info("writing the transformer to %s", load)
    network = build_on_meta(model["network_config"])
    with new_folder(load) as folder:
        save_sat_transformer(folder, random_state(network, dtype=torch.float16))
    logger.info("writing the autoencoder to %s", vae)
    autoencoder = build_on_meta(model["first_stage_config"])
    make_output_folder(vae.parent)
    save_torch({"state_dict": dict(random_state(autoencoder, dtype=torch.float32))}, vae)
    logger.info("writing T5 with %d layers to %s", t5_layers, t5)
    patches = model["network_config"]["params"]["modules"]["patch_embed_config"]["params"]
    write_t5(t5, width=patches["text_hidden_size"], num_layers=t5_layers, dtype=t5_dtype)


def paths_of(config: Config) -> dict[str, Path]:
    """Return the paths where a configuration expects its weights, as keywords of `write_weights`.

    Raises:
        UserError: a path is not set, or the number of T5 embedders is not one.
    """
    check_model_section(config.model)
    load = config.args.load
    if not load:
        raise UserError("args.load is not set; set it to the path to write the weights to")
    vae, *texts = weight_paths(config.model)
    paths = [expanded(named.path()) for named in (vae, *texts)]
    if len(texts) != 1:
        raise UserError(
            f"model.conditioner_config has {len(texts)} T5 embedders; it must have exactly one"
        )
    return {"load": expanded(load), "vae": paths[0], "t5": paths[1]}


def main(argv: Sequence[str] | None = None) -> int:
    """Write all parts and return the exit code. Existing files are not overwritten."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", nargs="+", required=True, help="configurations, merged in order")
    parser.add_argument("--t5-layers", type=int, default=XXL_LAYERS, help="default: as T5 XXL")
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
