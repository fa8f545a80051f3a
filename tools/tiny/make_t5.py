"""Make the T5 folder of CogVideoX-tiny: its tokenizer and untrained weights.

    python -m tools.tiny.make_t5 --output CogVideoX-tiny-sat/t5

The weights are trained together with the transformer; tools/tiny/export.py replaces them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.files import new_folder
from tools.tiny.shapes import ShapeClips

VOCAB_SIZE = 384  # 256 byte tokens, so that any prompt can be encoded, and the words in captions
NUM_CAPTIONS = 3000
WORD_REPEATS = 200  # repeats each word so often that it becomes one token


def train_tokenizer(folder: Path, *, seed: int) -> None:
    """Train and write ``spiece.model``, with T5's ids: padding 0, end 1, unknown 2."""
    from sentencepiece import SentencePieceTrainer

    clips = ShapeClips(NUM_CAPTIONS, seed)
    lines = [clips.caption(index) for index in range(NUM_CAPTIONS)]
    words = sorted({word for line in lines for word in line.split()})
    with (folder / "spiece.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines + words * WORD_REPEATS), model_writer=file,
            vocab_size=VOCAB_SIZE, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip


def make_encoder(folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` of an untrained T5 v1.1 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=3,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)


def main() -> int:
    """Make the folder; raise an error if it exists."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_up_logging()
    torch.manual_seed(options.seed)
    with new_folder(options.output) as folder:
        train_tokenizer(folder, seed=options.seed)
        make_encoder(folder)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
