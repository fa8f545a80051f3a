"""Results of measurements, counted operations and random weights, for all sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgm.util import instantiate_from_config

# Dense bf16 rates in TFLOP/s by the words of a device's name, from NVIDIA's data sheets.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312, "B200": 2250}


@dataclass(frozen=True)
class Measured:
    """Time and memory of a call.

    Args:
        seconds: median of the repetitions.
        peak_memory: peak bytes on the GPU over all repetitions, with weights; 0 on a CPU.
        spread: half the difference of the slowest and the fastest, as a fraction of `seconds`.
        flops: operations of the model; None if they are not counted.
        ready_at: `time.time()` when everything was loaded; None if that is not measured.
    """

    seconds: float
    peak_memory: int
    spread: float = 0.0
    flops: float | None = None
    ready_at: float | None = None


def choose_device() -> torch.device:
    """The first GPU, or the CPU if there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def peak_rate(device_name: str) -> float | None:
    """The dense bf16 rate in FLOP/s of the device of this name; None if it is unknown."""
    rates = [rate * 1e12 for words, rate in PEAK_TFLOPS.items() if words in device_name]
    return rates[0] if rates else None


def forward_flops(linear_weights: int, *, num_tokens: int, num_layers: int, width: int) -> float:
    """Operations of the blocks for one sample; a multiply-add counts as two.

    Args:
        linear_weights: number of weights of all blocks that each token is multiplied with.
        num_tokens: of text and video.
        num_layers: number of blocks.
        width: of a token, for the attention's two products, queries with keys and with values.
    """
    return 2.0 * linear_weights * num_tokens + 4.0 * num_layers * width * num_tokens**2


def fill_random(name: str, weight: Tensor) -> None:
    """Fill a weight in place: matrices with random values, scales with ones, shifts with zeros."""
    if weight.ndim > 1:
        weight.normal_(std=0.02)
    else:
        weight.fill_(float(name.endswith("weight")))


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Fill all parameters of a module as `fill_random` does."""
    for name, weight in module.named_parameters():
        fill_random(name, weight)


def random_network(
    node: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The transformer of a node with random weights, LoRA layers included."""
    with torch.device("meta"):
        network = instantiate_from_config(node)
    network.to(dtype).to_empty(device=device)
    randomize(network)
    network.add_lora()
    return network
