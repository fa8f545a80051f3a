"""Text to video in one place: encode the prompt, sample latents, decode them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from sgm.config import Config, SamplingArgs
from sgm.distributed import Rank
from sgm.errors import UserError
from sgm.models.tiled_decoding import TILE
from sgm.modules.transformer.attention import check_attention
from sgm.modules.transformer.linear import check_fp8, quantize_linears
from sgm.preflight import RunWeights, find_weights
from sgm.prompts import Prompt
from sgm.toolchain import can_compile_kernels, check_compile

if TYPE_CHECKING:
    from sgm.engine import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


# From so many steps on, compiling pays on a GPU: 5 to 10 s once, and 0.08 s less for each step.
COMPILE_STEPS = 100


def choose_device(args: SamplingArgs, rank: Rank) -> torch.device:
    """The device of this rank.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    import torch

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
        weights: what `find_weights` found for it, if that was called already.

    Raises:
        UserError: the configuration or a file of weights is wrong.
    """
    import torch

    from sgm.engine import SATVideoDiffusionEngine
    from sgm.memory import choose_memory
    from sgm.util import check_params

    args = config.args
    if weights is None:
        model = config.model | {"latent_input": False}
        weights = find_weights(model, args.load, lora=args.lora)
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


def count_steps(
    engine: SATVideoDiffusionEngine, args: SamplingArgs, prompts: Iterable[Prompt]
) -> int | None:
    """Steps of all videos together; None for prompts that are still to be typed."""
    if not isinstance(prompts, list):
        return None
    return len(prompts) * args.batch_size * engine.sampler.num_steps


def compile_network(
    engine: SATVideoDiffusionEngine, args: SamplingArgs, *, device: torch.device, steps: int | None
) -> None:
    """Compile the transformer where that is asked for, or pays."""
    pays = device.type == "cuda" and (steps or 0) >= COMPILE_STEPS and can_compile_kernels()
    if pays if args.compile is None else args.compile:
        logger.info("the transformer is compiled in the first step, which takes longer for that")
        engine.model.diffusion_model.compile_blocks()


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
