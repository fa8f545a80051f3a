"""Matrix products of the blocks' MLPs in float8: faster on GPUs that have it, and lossy.

Both factors of a product are rounded to e4m3 (Micikevicius et al., "FP8 Formats for Deep
Learning", 2022), which keeps 4 significant bits: each weight row (an output channel) and each token
with a scale of its own, so that their largest values become the largest of the format.

The MLP has two thirds of a block's products with weights. Those of the attention stay as they are:
on the bundled model they cost far more of the result than the MLP's.
"""

from __future__ import annotations

import logging

import torch
from sat.model.base_model import BaseModel
from torch import Tensor, nn

from sgm.errors import UserError

logger = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
_SMALLEST_PEAK = 1e-12  # of a row; keeps the scale of a row of zeros from being zero
_DIVISOR = 16  # of both sizes of a weight, for a GPU's product
_CAPABILITY = (8, 9)  # Ada; float8 products exist from there on


class Fp8Linear(nn.Module):
    """A Linear (k → n channels) whose products are of float8 factors; for inference.

    The product and the bias are bfloat16 whatever the run's type is, since PyTorch offers no other
    type for scales by row on every GPU. A GPU adds up with fewer bits than float32 (its "fast
    accumulation"); elsewhere the same factors are multiplied in float32.

    Raises:
        UserError: a size of the weight that a GPU cannot multiply.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        if any(size % _DIVISOR for size in linear.weight.shape):
            raise UserError(
                f"fp8: a weight of size {list(linear.weight.shape)} is not divisible by "
                f"{_DIVISOR}; leave fp8 out"
            )
        weight, scale = to_float8(linear.weight.detach())
        bias = linear.bias.detach().bfloat16()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (n, k)
        self.scale = nn.Parameter(scale, requires_grad=False)  # (n, 1)
        self.bias = nn.Parameter(bias, requires_grad=False)  # (n,)

    def forward(self, x: Tensor) -> Tensor:
        """The result (…, n) for x (…, k), in its type."""
        tokens, token_scale = to_float8(x.flatten(0, -2))  # (m, k), (m, 1)
        product = scaled_product(
            tokens, self.weight, token_scale=token_scale, weight_scale=self.scale, bias=self.bias
        )  # (m, n)
        return product.unflatten(0, x.shape[:-1]).to(x.dtype)


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (m, k) as float8 factors (m, k) and float32 scales (m, 1), whose product they are."""
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_PEAK) / LARGEST
    return (rows / scale).to(FLOAT8), scale


def scaled_product(
    tokens: Tensor, weight: Tensor, *, token_scale: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """``tokens weight^T + bias`` of float8 (m, k) and (n, k) → (m, n) bfloat16.

    Args:
        tokens, weight: the factors.
        token_scale, weight_scale: of their rows, (m, 1) and (n, 1), float32.
        bias: (n,) bfloat16.
    """
    if tokens.is_cuda:
        return torch._scaled_mm(
            tokens,
            weight.t(),
            scale_a=token_scale,
            scale_b=weight_scale.t(),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    product = tokens.float() @ weight.float().t()
    return (product * token_scale * weight_scale.t() + bias).bfloat16()


def runs_on(device: torch.device) -> bool:
    """Whether there are float8 products on `device`; a CPU emulates them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY


def check_device(device: torch.device) -> None:
    """Raise UserError for a GPU without float8 products; tell that a CPU has none either."""
    if device.type == "cpu":
        logger.info("fp8: a CPU emulates float8 products, which is slow")
    if not runs_on(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"fp8: {name} has no float8 products (Ada or newer has); leave fp8 out")


def quantize_linears(network: BaseModel) -> None:
    """Replace both Linears of each block's MLP by `Fp8Linear`.

    Raises:
        UserError: their sizes do not allow it.
    """
    for layer in network.transformer.layers:
        layer.mlp.dense_h_to_4h = Fp8Linear(layer.mlp.dense_h_to_4h)
        layer.mlp.dense_4h_to_h = Fp8Linear(layer.mlp.dense_4h_to_h)
