"""Loading an engine for inference: its device, what is on the GPU and when, what is compiled."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

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


# From so many steps on, compiling pays on a GPU: 5 to 10 s once, and 0.08 s less for each step.
COMPILE_STEPS = 100
# A transformer of so many weights takes minutes for a step on a CPU.
LARGE_MODEL = 500_000_000

# The most that is there beside the weights, counted in half types and without compiling, which
# takes half as much. Sampling: in tokens of a guided step, as wide as the network. Decoding: in the
# first 9 frames with the last level's channels; 3 of these 9 are kept by convolutions between
# chunks, on the host in mode low.
SAMPLING_TENSORS = 16
DECODING_TENSORS, DECODING_TENSORS_LOW = 9, 6

_GIB = 2**30
RESERVE = _GIB  # for what CUDA's libraries take for themselves, and for gaps between tensors


def choose_device(args: CommonArgs, rank: Rank) -> torch.device:
    """The device of this rank.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device: cuda, but PyTorch sees no GPU; use --device cpu or check nvidia-smi"
        )
    if rank.local_index >= torch.cuda.device_count():
        raise UserError(
            f"this host has {torch.cuda.device_count()} GPUs, too few for process "
            f"{rank.local_index + 1}; lower NPROC or use --device cpu"
        )
    device = torch.device("cuda", rank.local_index)
    torch.cuda.set_device(device)  # where NCCL and the kernels of others expect it
    return device


def load_engine(
    config: Config, device: torch.device, *, weights: RunWeights | None = None
) -> SATVideoDiffusionEngine:
    """Build the engine of a configuration for inference, with its weights.

    Args:
        config: the configuration.
        device: where the engine computes.
        weights: what `check_sampling` found for it, if that was called already.

    Raises:
        UserError: the configuration or a file of weights is wrong.
    """
    args = config.args
    weights = weights or check_sampling(config)
    for key in ("load", "lora"):
        if config.model.get(key) is not None:
            raise UserError(f"{key} stands under model in the configuration; put it under args")
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
        "latent_input": False,  # of training batches; sampling decodes in any case
    }
    params = check_params(
        SATVideoDiffusionEngine, weights.within(config.model) | extra, where=config.place("model")
    )
    if not params.get("sampler_config"):
        raise UserError(f"{config.place('model')}: sampler_config is absent; sampling needs one")
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


def compile_network(
    engine: SATVideoDiffusionEngine, choice: bool | None, *, num_steps: int
) -> bool:
    """Compile the transformer's blocks where `choice` asks for it, or where it is None and pays.

    Returns:
        Whether they are compiled.
    """
    if choice is None:
        is_long = num_steps >= COMPILE_STEPS
        choice = engine.device.type == "cuda" and is_long and can_compile_kernels()
    if choice:
        logger.info("the transformer is compiled in the first step, which takes longer for that")
        engine.model.diffusion_model.compile_blocks()
    return choice


def warn_of_settings(engine: SATVideoDiffusionEngine, args: SamplingArgs) -> None:
    """Warn of what will take long, and of what does not do what it looks like."""
    num_weights = sum(weight.numel() for weight in engine.model.parameters())
    if engine.device.type == "cpu" and num_weights > LARGE_MODEL:
        logger.warning("without a GPU a step of this model takes many minutes, a video hours")
    if args.parallel == "video" and Rank.from_environment().world_size == 1:
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
