"""Encode drawn clips to a file of latents; also the dataset that reads this file.

python -m tools.tiny.latents --output latents.safetensors --count 30000
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.files import replacing
from sgm.progress import Progress
from tools.tiny.shapes import ShapeClips
from tools.tiny.train_vae import CONFIG, encode_means, load_autoencoder

logger = logging.getLogger(__name__)


class LatentClips(Dataset):
    """Unscaled latents and captions from a file that this module wrote, loaded into memory.

    Items are ``{"mp4": float32 (t, c, h, w), "txt": caption}``, for ``latent_input: true``. Each
    latent is the mean of the autoencoder's distribution, because the standard deviation is far
    smaller than the noise of diffusion.

    Args:
        data_dir: path of the file.
    """

    def __init__(self, data_dir: str) -> None:
        with safe_open(data_dir, framework="pt") as file:
            self.latents = file.get_tensor("latents")
            self.captions = json.loads(file.metadata()["captions"])

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return {"mp4": self.latents[index].float(), "txt": self.captions[index]}


def encode(clips: ShapeClips, config: str, *, batch_size: int, num_workers: int) -> Tensor:
    """Encode all clips and return the means of their latents, float16 (n, t, c, h, w)."""
    vae = load_autoencoder(config)
    loader = DataLoader(clips, batch_size=batch_size, num_workers=num_workers)
    parts = []
    with Progress(len(loader), unit="batch") as progress:
        for batch in loader:
            parts.append(encode_means(vae, batch["mp4"]).half().cpu())
            progress.step("encoding")
    return torch.cat(parts)


def main() -> int:
    """Draw and encode the clips, and save their latents and captions."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default=CONFIG, help="YAML file with the autoencoder")
    parser.add_argument("--count", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--held-out", action="store_true", help="draw combinations not used in training"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=min(os.cpu_count() or 1, 12))
    options = parser.parse_args()
    set_up_logging()
    clips = ShapeClips(options.count, options.seed, held_out=options.held_out)
    latents = encode(
        clips, options.config, batch_size=options.batch_size, num_workers=options.num_workers
    )
    captions = [clips.caption(index) for index in range(options.count)]
    with replacing(options.output) as partial:
        save_file({"latents": latents}, partial, {"captions": json.dumps(captions)})
    logger.info(
        "wrote %d latents of shape %s to %s", len(latents), tuple(latents.shape[1:]), options.output
    )
    return 0


if __name__ == "__main__":
    run_and_exit(main)
