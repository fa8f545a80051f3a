"""What somebody who samples may not expect of the settings, said before the work begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from sgm.models.tiled_decoding import TILE

if TYPE_CHECKING:
    from arguments import SamplingArgs
    from diffusion_video import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)

# Weights of the transformer, from which on a CPU takes minutes for a step.
LARGE_MODEL = 500_000_000


def advise(
    engine: SATVideoDiffusionEngine, args: SamplingArgs, *, device: torch.device, world_size: int
) -> None:
    """Warn of what will take long, and of what does not do what it looks like."""
    num_weights = sum(weight.numel() for weight in engine.model.parameters())
    if device.type == "cpu" and num_weights > LARGE_MODEL:
        logger.warning("without a GPU a step of this model takes many minutes, a video hours")
    if args.parallel == "video" and world_size == 1:
        logger.warning(
            "parallel: video has no effect in one process; NPROC=2 bash inference.sh … starts two"
        )
    num_steps = engine.sampler.num_steps
    own_steps = getattr(engine.sampler.guider, "num_steps", num_steps)
    if own_steps != num_steps:
        logger.warning(
            "guider_config has num_steps %d, the sampler %d: guidance then follows the curve of "
            "another number of steps; change both alike",
            *(own_steps, num_steps),
        )
    if args.tile_decode and max(engine.model.diffusion_model.frame_shape[1:]) <= TILE:
        logger.warning("tile_decode has no effect: these frames fit into one tile")
