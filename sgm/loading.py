"""Load an engine for inference: choose its device and memory mode, compile it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch

from sgm.config import CommonArgs, Config, SamplingArgs
from sgm.distributed import Rank
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.models.autoencoder import FIRST_CHUNK_FRAMES
from sgm.models.tiled_decoding import TILE
from sgm.modules.transformer.attention import check_attention
from sgm.modules.transformer.linear import check_fp8, quantize_linears
from sgm.preflight import SPATIAL_FACTOR, TEMPORAL_FACTOR, RunWeights, check_sampling
from sgm.toolchain import can_compile_kernels, check_compile
from sgm.util import check_params

logger = logging.getLogger(__name__)


# On a GPU compiling pays off from this number of steps on: it takes 5 to 10 s once, and saves
# 0.08 s per step.
COMPILE_STEPS = 100
# From this number of weights on, a step of the transformer takes minutes on a CPU.
LARGE_MODEL = 500_000_000

# Peak memory besides the weights, measured in half precision without compiling (compiling halves
# it). SAMPLING_TENSORS is a multiple of one activation tensor of a guided step: all tokens times
# the network's width. DECODING_TENSORS is a multiple of the first 9 frames with the channels of the
# last resolution level. 3 of its 9 tensors are what the convolutions keep between chunks; with
# `memory: low` these 3 are in host memory.
SAMPLING_TENSORS = 16
DECODING_TENSORS, DECODING_TENSORS_LOW = 9, 6

_GIB = 2**30
RESERVE = _GIB  # for the CUDA libraries' own memory and for fragmentation


def choose_device(args: CommonArgs, rank: Rank) -> torch.device:
    """Return the device of this rank: the CPU, or the GPU with the rank's local index.

    Raises:
        UserError: the host has too few GPUs for this rank, or none although `args.device` is
            "cuda".
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cpu" or (args.device == "auto" and not num_gpus):
        return torch.device("cpu")
    if rank.local_index >= num_gpus:
        raise UserError(
            f"this host has only {num_gpus} GPUs, so no GPU is left for process "
            f"{rank.local_index + 1}; lower NPROC or use --device cpu"
            if num_gpus
            else "device: cuda, but PyTorch sees no GPU; use --device cpu or check nvidia-smi"
        )
    device = torch.device("cuda", rank.local_index)
    torch.cuda.set_device(device)  # NCCL and the kernels of other libraries use the current device
    return device


def load_engine(
    config: Config, device: torch.device, *, weights: RunWeights | None = None
) -> SATVideoDiffusionEngine:
    """Build the engine of a configuration for inference, and load its weights.

    Args:
        config: the configuration.
        device: the device of the engine.
        weights: the result of `check_sampling`, if it was called already.

    Raises:
        UserError: the configuration or a file of weights is invalid.
    """
    args = config.args
    weights = weights or check_sampling(config)
    for key in ("load", "lora"):
        if config.model.get(key) is not None:
            raise UserError(f"{key} is under model in the configuration; move it to args")
    if args.fp8:
        check_fp8(device)
    if args.compile:
        check_compile(device.type)
    dtype = getattr(torch, args.precision)
    check_attention(args.attention, config.model, device=device, dtype=dtype)
    extra = {
        "load": weights.transformer,
        "lora": weights.loras,
        "dtype": dtype,
        "device": "meta",
        "tile_decode": args.tile_decode,
        "latent_input": False,  # true is for training only; sampling needs the autoencoder
    }
    params = check_params(
        SATVideoDiffusionEngine, weights.within(config.model) | extra, where=config.place("model")
    )
    if not params.get("sampler_config"):
        raise UserError(f"{config.place('model')}: sampler_config is missing; add it for sampling")
    engine = SATVideoDiffusionEngine(**params).eval()
    memory = choose_memory(args, engine, device=device, dtype=dtype)
    engine.load_weights(device, stream_text=memory == "low")
    engine.model.diffusion_model.set_attention(args.attention)
    if args.fp8:
        quantize_linears(engine.model.diffusion_model)
    if memory == "low":
        engine.offload()
    return engine


@dataclass(frozen=True)
class MemoryNeeds:
    """The peak GPU memory, in bytes, of generating a video in each memory mode."""

    high: int
    low: int


def choose_memory(
    args: SamplingArgs, engine: SATVideoDiffusionEngine, *, device: torch.device, dtype: torch.dtype
) -> Literal["high", "low"]:
    """Return the memory mode of a run on this device, and log the mode with the reason.

    Args:
        args: the options of the run. ``memory: auto`` estimates the memory for videos with
            `sampling_num_frames` latent frames.
        engine: the engine, still on the device "meta".
        device: the device of the run.
        dtype: the type of the weights in the run.
    """
    if device.type != "cuda":
        if args.memory == "low":
            logger.info("using memory: high, because a CPU has no other memory to offload to")
        return "high"
    if args.memory != "auto":
        logger.info("memory: %s, as set by the option memory", args.memory)
        return args.memory
    free, _ = torch.cuda.mem_get_info(device)
    mode, reason = plan(estimate_needs(args, engine, dtype=dtype), free=free)
    logger.info("memory: %s, because %s", mode, reason)
    return mode


def plan(needs: MemoryNeeds, *, free: int) -> tuple[Literal["high", "low"], str]:
    """Return the mode for a GPU with `free` free bytes, and the reason as a clause for the log."""
    high, low, available = (f"{size / _GIB:.1f}" for size in (needs.high, needs.low, free))
    if needs.high <= free:
        return "high", f"all weights on the GPU need about {high} of its {available} free GiB"
    reason = (
        f"all weights on the GPU need about {high} GiB, but only {available} GiB are free; mode "
        f"low needs about {low} GiB"
    )
    return "low", reason if needs.low <= free else f"{reason}, which is also more than is free"


def estimate_needs(
    args: SamplingArgs, engine: SATVideoDiffusionEngine, *, dtype: torch.dtype
) -> MemoryNeeds:
    """Estimate the peak memory of sampling and decoding from the sizes of the engine's parts.

    Args:
        args: the options of the run, which contain the size of the videos.
        engine: the engine; it may be on the device "meta".
        dtype: the type of the weights in the run.
    """
    network, autoencoder = engine.model.diffusion_model, engine.first_stage_model
    text_bytes = sum(weight.nbytes for weight in engine.conditioner.parameters())
    network_bytes, autoencoder_bytes, decoder_bytes = (
        dtype.itemsize * sum(weight.numel() for weight in part.parameters())
        for part in (network, autoencoder, autoencoder.decoder)
    )
    num_tokens = args.sampling_num_frames * math.prod(network.grid_size)
    num_tokens += network.mixins["pos_embed"].text_length
    tokens = 2 * num_tokens * network.hidden_size * dtype.itemsize  # guidance doubles the batch
    num_frames = TEMPORAL_FACTOR * (min(args.sampling_num_frames, FIRST_CHUNK_FRAMES) - 1) + 1
    channels = autoencoder.decoder.conv_out.conv.in_channels
    sides = args.sampling_image_size
    longest = SPATIAL_FACTOR * TILE if args.tile_decode else max(sides)
    num_pixels = math.prod(min(side, longest) for side in sides)
    frames = num_frames * num_pixels * channels * dtype.itemsize
    sampling = tokens * SAMPLING_TENSORS
    weights = network_bytes + autoencoder_bytes + text_bytes
    return MemoryNeeds(
        high=RESERVE + weights + max(sampling, frames * DECODING_TENSORS),
        low=RESERVE + max(network_bytes + sampling, decoder_bytes + frames * DECODING_TENSORS_LOW),
    )


def compile_network(
    engine: SATVideoDiffusionEngine, choice: bool | None, *, num_steps: int
) -> bool:
    """Compile the transformer's blocks if `choice` is true, or if it is None and compiling pays.

    Args:
        engine: the engine, with its weights loaded.
        choice: the option `compile`.
        num_steps: number of sampling steps that the engine will compute.

    Returns:
        True if the blocks are compiled.
    """
    if choice is None:
        is_long = num_steps >= COMPILE_STEPS
        choice = engine.device.type == "cuda" and is_long and can_compile_kernels()
    if choice:
        logger.info("the first step takes longer, because it compiles the transformer")
        engine.model.diffusion_model.compile_blocks()
    return choice


def warn_of_settings(engine: SATVideoDiffusionEngine) -> None:
    """Warn if a step takes minutes, or if guidance is set up for another number of steps."""
    num_weights = sum(weight.numel() for weight in engine.model.parameters())
    if engine.device.type == "cpu" and num_weights > LARGE_MODEL:
        logger.warning("without a GPU, this model takes many minutes per step and hours per video")
    num_steps = engine.sampler.num_steps
    own_steps = getattr(engine.sampler.guider, "num_steps", None) or num_steps
    if own_steps != num_steps:
        logger.warning(
            "num_steps is %d in guider_config but %d in the sampler, so the guidance curve does "
            "not fit the steps; set both to the same number",
            own_steps,
            num_steps,
        )
