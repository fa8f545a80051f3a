"""Whether all weights fit on the GPU beside the work, or come to it only while they are used."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from sgm.models.autoencoder import FIRST_CHUNK_FRAMES
from sgm.models.tiled_decoding import TILE
from sgm.preflight import SPATIAL_FACTOR, TEMPORAL_FACTOR

if TYPE_CHECKING:
    from sgm.engine import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


# The most that is there beside the weights, counted in half types and without compiling, which
# takes half as much. Sampling: in tokens of a guided step, as wide as the network. Decoding: in the
# first 9 frames with the last level's channels; 3 of these 9 are kept by convolutions between
# chunks, on the host in mode low.
SAMPLING_TENSORS = 16
DECODING_TENSORS, DECODING_TENSORS_LOW = 9, 6

_GIB = 2**30
RESERVE = _GIB  # for what CUDA's libraries take for themselves, and for gaps between tensors


@dataclass(frozen=True)
class Needs:
    """Bytes of GPU memory that making a video takes at its peak in each mode."""

    high: int
    low: int


def choose_memory(
    args: Any, engine: SATVideoDiffusionEngine, *, device: torch.device, dtype: torch.dtype
) -> Literal["high", "low"]:
    """The mode that `args.memory` means on this device; logs it, with the reason.

    Args:
        args: of the sampling command.
        engine: on the device "meta".
        device, dtype: of the run.
    """
    if device.type != "cuda":
        if args.memory == "low":
            logger.info("memory: high, since on a CPU everything is in one memory anyway")
        return "high"
    if args.memory != "auto":
        logger.info("memory: %s, as asked for", args.memory)
        return args.memory
    free, _ = torch.cuda.mem_get_info(device)
    mode, reason = plan(estimate_needs(args, engine, dtype=dtype), free=free)
    logger.info("memory: %s, since %s", mode, reason)
    return mode


def plan(needs: Needs, *, free: int) -> tuple[Literal["high", "low"], str]:
    """The mode for a GPU with `free` bytes, and the reason as the end of a sentence."""
    high, low, there = (f"{size / _GIB:.1f}" for size in (needs.high, needs.low, free))
    if needs.high <= free:
        return "high", f"all weights on the GPU need about {high} of its {there} free GiB"
    reason = (
        f"all weights on the GPU need about {high} GiB and {there} are free; they come to it while "
        f"they are used only, which needs about {low}"
    )
    return "low", reason if needs.low <= free else f"{reason}, still more than is free"


def estimate_needs(args: Any, engine: SATVideoDiffusionEngine, *, dtype: torch.dtype) -> Needs:
    """What the videos of a command need, from the sizes of an engine on the device "meta"."""
    network, autoencoder = engine.model.diffusion_model, engine.first_stage_model
    text_bytes = sum(weight.nbytes for weight in engine.conditioner.parameters())
    network_bytes, autoencoder_bytes, decoder_bytes = (
        dtype.itemsize * sum(weight.numel() for weight in part.parameters())
        for part in (network, autoencoder, autoencoder.decoder)
    )
    num_tokens = args.sampling_num_frames * math.prod(network.grid_size)
    num_tokens += network.mixins["pos_embed"].text_length
    tokens = 2 * num_tokens * network.hidden_size * dtype.itemsize  # guidance doubles them
    num_frames = TEMPORAL_FACTOR * (min(args.sampling_num_frames, FIRST_CHUNK_FRAMES) - 1) + 1
    channels = autoencoder.decoder.conv_out.conv.in_channels
    longest = SPATIAL_FACTOR * TILE if args.tile_decode else math.inf
    num_pixels = math.prod(min(side, longest) for side in args.sampling_image_size)
    frames = num_frames * num_pixels * channels * dtype.itemsize
    sampling = tokens * SAMPLING_TENSORS
    weights = network_bytes + autoencoder_bytes + text_bytes
    return Needs(
        high=RESERVE + weights + max(sampling, frames * DECODING_TENSORS),
        low=RESERVE + max(network_bytes + sampling, decoder_bytes + frames * DECODING_TENSORS_LOW),
    )
