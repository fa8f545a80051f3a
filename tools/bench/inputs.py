"""What all implementations of inference are measured on: random values of a model's sizes."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from sgm.config import Config
from sgm.preflight import TEMPORAL_FACTOR, latent_shape

PROMPT = "a red circle moving left"
WARMUP, REPEATS = 1, 3
WARMUP_STEPS = 2  # of a whole video, which compile all that the measured one runs


def repeats(
    options: argparse.Namespace, *, warmup: int = WARMUP, steps: int = REPEATS
) -> dict[str, int]:
    """How often `measure` runs a piece; `warmup` and `steps` where the options do not say."""
    return {"warmup": options.warmup or warmup, "steps": options.steps or steps}


def step_repeats(options: argparse.Namespace, device: torch.device) -> dict[str, int]:
    """The same for a step: a GPU takes some of them until it has settled at its power limit."""
    return repeats(options) if device.type == "cpu" else repeats(options, warmup=5, steps=10)


def run_dtype(config: Config) -> torch.dtype:
    """The precision of the run."""
    return getattr(torch, config.args.precision)


def t5_params(config: Config) -> dict[str, Any]:
    """The params of the T5 embedder, to change `model_dir` or to read `max_length`."""
    return config.model["conditioner_config"]["params"]["emb_models"][0]["params"]


def video_shape(config: Config) -> tuple[int, int, int, int, int]:
    """(1, t, 3, h, w) of the video that the configuration makes."""
    num_latent_frames = latent_shape(config.args, config.model)[0]
    params = config.model["network_config"]["params"]
    factor = params.get("time_compressed_rate", TEMPORAL_FACTOR)
    return (1, factor * (num_latent_frames - 1) + 1, 3, *config.args.sampling_image_size)


def video(config: Config, device: torch.device) -> Tensor:
    """A video (1, t, 3, h, w) in [-1, 1]."""
    return torch.rand(video_shape(config), device=device) * 2 - 1


def latents(config: Config, device: torch.device) -> Tensor:
    """Latents (1, t, c, h, w), standard normal."""
    return torch.randn(1, *latent_shape(config.args, config.model), device=device)


def text_shape(config: Config) -> tuple[int, int]:
    """(n, d) of a text embedding."""
    modules = config.model["network_config"]["params"]["modules"]
    return (
        modules["pos_embed_config"]["params"]["text_length"],
        modules["patch_embed_config"]["params"]["text_hidden_size"],
    )


def step_inputs(config: Config, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (1, t, c, h, w), texts (2, n, d) and timestep (1,) of a step with guidance."""
    texts = torch.randn(2, *text_shape(config), device=device)
    return latents(config, device), texts, torch.tensor([500], device=device)
