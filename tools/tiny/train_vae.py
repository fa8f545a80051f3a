"""Train the video autoencoder of CogVideoX-tiny on clips that are drawn on the fly.

    python -m tools.tiny.train_vae --output CogVideoX-tiny-sat/vae/3d-vae.pt

At the end it logs the PSNR of new clips and the value of `scale_factor` for the configurations.
Latents multiplied by this factor have unit variance.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import read_yaml
from sgm.files import save_torch
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper, encode_moments
from sgm.models.autoencoder_training import TrainableVideoAutoencoder
from sgm.util import instantiate_from_config
from tools.bench.measuring import choose_device
from tools.tiny.shapes import NUM_FRAMES, ShapeClips

logger = logging.getLogger(__name__)

CONFIG = "configs/cogvideox_tiny_infer.yaml"
FRESH_SEED = 10**6  # larger than the seed of any training run, so that its clips are new


class Autoencoder(TrainableVideoAutoencoder):
    """The autoencoder, trained with a linear warm-up and a cosine decay of the learning rate."""

    num_steps: int
    warmup_steps: int
    num_frames: int

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Run the training step on the first `num_frames` frames of each clip."""
        return super().training_step({"mp4": batch["mp4"][:, : self.num_frames]}, batch_idx)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and the learning rate schedule, which advances after each batch."""
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.01)

        def factor(step: int) -> float:
            rest = 0.5 * (1 + math.cos(math.pi * min(step / self.num_steps, 1)))
            return min((step + 1) / self.warmup_steps, 1) * rest

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def psnr(video: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (b,), of each clip (b, …) in [-1, 1]."""
    error = (video.clamp(-1, 1) - target).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


def load_autoencoder(*configs: str) -> VideoAutoencoderInferenceWrapper:
    """Load the autoencoder of merged configurations, on a GPU if there is one."""
    sections, _ = read_yaml(configs)
    vae = instantiate_from_config(sections["model"]["first_stage_config"])
    return vae.eval().to(choose_device())


def encode_means(vae: VideoAutoencoderInferenceWrapper, clips: Tensor) -> Tensor:
    """Return the latent means (b, t, z, h, w) of clips (b, t', 3, h', w') on any device."""
    return encode_moments(vae, clips).chunk(2, dim=2)[0]


@torch.no_grad()
def reconstruct_fresh(
    vae: VideoAutoencoderInferenceWrapper, num_clips: int
) -> tuple[Tensor, Tensor]:
    """Encode and decode new clips of held-out combinations, which training never draws.

    Returns:
        The PSNR of each clip, (num_clips,), and the means of the latents, (num_clips, t, z, h, w).
    """
    clips = ShapeClips(num_clips, FRESH_SEED, held_out=True)
    fidelity, latents = [], []
    for batch in DataLoader(clips, batch_size=8):
        means = encode_means(vae, batch["mp4"])
        video = vae.decode(means.transpose(1, 2)).transpose(1, 2)
        fidelity.append(psnr(video, batch["mp4"].to(video)))
        latents.append(means)
    return torch.cat(fidelity), torch.cat(latents)


def build(config: str, *, load: str | None, learning_rate: float, kl_weight: float) -> Autoencoder:
    """Build the autoencoder of `first_stage_config`, with the weights in `load` or random ones."""
    sections, _ = read_yaml([config])
    params = sections["model"]["first_stage_config"]["params"]
    ignored = {"ckpt_path", "ignore_keys", *Autoencoder.IGNORED_PARAMS}
    params = {name: value for name, value in params.items() if name not in ignored}
    vae = Autoencoder(**params, ckpt_path=load)
    vae.learning_rate, vae.kl_weight = learning_rate, kl_weight
    return vae


def save(vae: VideoAutoencoderInferenceWrapper, path: Path) -> None:
    """Write the weights to `path` as ``{"state_dict": …}`` in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.float().cpu() for name, tensor in vae.state_dict().items()}
    save_torch({"state_dict": state}, path)


def parse_options() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--load", help="start from these weights")
    parser.add_argument(
        "--decoder-only", action="store_true", help="keep the encoder and the latents unchanged"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-frames", type=int, default=NUM_FRAMES, help="8k+1, per clip")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--kl-weight", type=float, default=3e-4)
    parser.add_argument("--precision", default="bf16-mixed", help="for Lightning's Trainer")
    parser.add_argument("--num-workers", type=int, default=min(os.cpu_count() or 1, 12))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Train and save the autoencoder, then log its fidelity."""
    options = parse_options()
    set_up_logging()
    pl.seed_everything(options.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    vae = build(
        options.config,
        load=options.load,
        learning_rate=options.learning_rate,
        kl_weight=options.kl_weight,
    )
    vae.num_steps, vae.warmup_steps = options.steps, options.warmup_steps
    vae.num_frames = options.num_frames
    vae.encoder.requires_grad_(not options.decoder_only)
    loader = DataLoader(
        ShapeClips(options.steps * options.batch_size, options.seed),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    trainer = pl.Trainer(
        max_steps=options.steps, precision=options.precision, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_model_summary=False, devices=1,
        benchmark=True,
    )  # fmt: skip
    trainer.fit(vae, loader)
    vae = vae.float().eval().to(choose_device())
    save(vae, options.output)
    fidelity, latents = reconstruct_fresh(vae, 64)
    std = float(latents.std())
    logger.info(
        "64 new clips: mean PSNR %.2f dB, minimum %.2f dB; the std of the latents is %.4f; set "
        "scale_factor: %.4f",
        float(fidelity.mean()), float(fidelity.min()), std, 1 / std,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run_and_exit(main)
