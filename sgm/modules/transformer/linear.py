"""The blocks' linear layers: projections in parts, the MLP's GELU, and products in float8.

Layers are SAT's Linear or the LoRA layers in their place, in a form that is fast when compiled.

Float8 is for the MLPs' products only, on GPUs that have it, and lossy. Both factors of a product
are rounded to e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022), which keeps 4
significant bits: each weight row (an output channel) and each token has a scale of its own, so that
its largest value becomes the largest of the format. The MLP has two thirds of a block's products
with weights. Those of the attention stay as they are: on the bundled model they cost far more of
the result than the MLP's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseModel
from torch import Tensor, nn

from sgm.errors import UserError

logger = logging.getLogger(__name__)


def project(linear: nn.Module, x: Tensor, *, num_parts: int) -> list[Tensor]:
    """What ``linear(x)`` holds in `num_parts` equal parts along its last axis, x (b, n, d).

    Computed part by part: to divide the whole, and to join the gradients of its parts again,
    would copy them.

    Args:
        linear: SAT's Linear, with a bias, or a LoRA layer on one.
    """
    base = getattr(linear, "original", linear)
    is_lora = base is not linear
    # ZeRO-3 brings the weights together for a module's call only. Autocast casts for PyTorch's
    # operators, not for the one of LoRA.
    is_divided = hasattr(base.weight, "ds_id")
    if is_divided or (is_lora and torch.is_autocast_enabled(x.device.type)):
        return list(linear(x).chunk(num_parts, dim=-1))
    if not is_lora:
        weights, biases = base.weight.chunk(num_parts), base.bias.chunk(num_parts)
        return [F.linear(x, *part) for part in zip(weights, biases, strict=True)]
    down = torch.cat(tuple(linear.matrix_A)) * linear.scaling
    dropped = linear.lora_dropout(x) if linear.training else x
    *parts, _ = lora_linear(
        x, None if dropped is x else dropped, base.weight, base.bias, down, list(linear.matrix_B)
    )
    return parts


@torch.library.custom_op("cogvideox::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    ups: list[Tensor],
) -> list[Tensor]:
    """A Linear with LoRA (Hu et al., "LoRA", section 4.1): ``W x + bias + B A x``, in parts.

    An operator of its own, because PyTorch's would write each product and read all again for their
    sum: here each product adds to the one before while it is written. Its gradient has none.

    Args:
        x: (…, d).
        dropped: what A is given in place of `x`, if that is something else.
        weight, bias: (parts * e, d) and (parts * e,).
        down: the A of all parts, with their scale, (parts * r, d).
        ups: the B of each part, (e, r).

    Returns:
        Each part (…, e); then, without a gradient, ``A x`` for the backward pass,
        (rows of x, parts * r).
    """
    rows = x.flatten(0, -2)
    low = (rows if dropped is None else dropped.flatten(0, -2)) @ down.t()
    count = len(ups)
    parts = []
    for up, of_part, part_weight, part_bias in zip(
        ups, low.chunk(count, dim=-1), weight.chunk(count), bias.chunk(count), strict=True
    ):
        part = torch.addmm(part_bias, of_part, up.t()).addmm_(rows, part_weight.t())
        parts.append(part.unflatten(0, x.shape[:-1]))
    return [*parts, low]


@lora_linear.register_fake
def _(x, dropped, weight, bias, down, ups) -> list[Tensor]:
    parts = [x.new_empty((*x.shape[:-1], up.shape[0])) for up in ups]
    return [*parts, x.new_empty((x.shape[:-1].numel(), down.shape[0]))]


def _save_for_lora(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, dropped, weight, _, down, ups = inputs
    ctx.save_for_backward(x, dropped, weight, down, output[-1], *ups)


def _lora_backward(ctx, gradients: list[Tensor]) -> tuple[Tensor | list[Tensor | None] | None, ...]:
    x, dropped, weight, down, low, *ups = ctx.saved_tensors
    of_x, of_dropped, of_weight, of_bias, of_down, of_ups = ctx.needs_input_grad
    *of_parts, _ = (gradient.flatten(0, -2) for gradient in gradients)
    count, rows = len(ups), x.flatten(0, -2)
    of_low = torch.cat([of_part @ up for of_part, up in zip(of_parts, ups, strict=True)], dim=-1)
    lefts, rights = of_parts, list(weight.chunk(count))
    if dropped is None:
        lefts, rights = [*lefts, of_low], [*rights, down]
    low_rows = rows if dropped is None else dropped.flatten(0, -2)
    return (
        sum_of_products(lefts, rights).unflatten(0, x.shape[:-1]) if of_x else None,
        (of_low @ down).unflatten(0, x.shape[:-1]) if of_dropped else None,
        torch.cat([of_part.t() @ rows for of_part in of_parts]) if of_weight else None,
        torch.cat([of_part.sum(dim=0) for of_part in of_parts]) if of_bias else None,
        of_low.t() @ low_rows if of_down else None,
        [
            of_part.t() @ part_low if needed else None
            for of_part, part_low, needed in zip(
                of_parts, low.chunk(count, dim=-1), of_ups, strict=True
            )
        ],
    )


lora_linear.register_autograd(_lora_backward, setup_context=_save_for_lora)


@torch.library.custom_op("cogvideox::sum_of_products", mutates_args=())
def sum_of_products(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    """``lefts[0] rights[0] + lefts[1] rights[1] + …`` of matrices; an operator as the one above."""
    total = lefts[0] @ rights[0]
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        total.addmm_(left, right)
    return total


@sum_of_products.register_fake
def _(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    return lefts[0].new_empty((lefts[0].shape[0], rights[0].shape[1]))


_HALF = (torch.float16, torch.bfloat16)


def activated(linear: nn.Module, x: Tensor, *, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``activation(linear(x))`` of a GELU (tanh approximation), x (b, n, d) → (b, n, 4d).

    On a GPU the GELU is computed on the product's float32 sums before they are rounded, which
    saves a pass over the largest tensor of a block. Where the weights are trained, the backward
    pass needs the product itself, so there it would cost more than it saves.
    """
    weight = linear.weight
    is_constant = not (torch.is_grad_enabled() and weight.requires_grad)
    # ZeRO-3 brings the weights together for a module's call only.
    is_whole = isinstance(linear.bias, Tensor) and not hasattr(weight, "ds_id")
    if is_constant and is_whole and weight.is_cuda and weight.dtype in _HALF:
        return linear_gelu(x, weight, linear.bias)
    return activation(linear(x))


@torch.library.custom_op("cogvideox::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh approximation) of ``x weight^T + bias``, x (…, d), weight (e, d) → (…, e).

    Has a gradient of x only. An operator of its own, since PyTorch's has none.
    """
    if not x.is_cuda:  # PyTorch's operator takes the exact GELU there
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    product = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return product.unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_for_gelu(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    x, weight, bias = ctx.saved_tensors
    product = F.linear(x, weight, bias)
    of_product = torch.ops.aten.gelu_backward(gradient, product, approximate="tanh")
    return of_product @ weight, None, None


linear_gelu.register_autograd(_gelu_backward, setup_context=_save_for_gelu)

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


def fp8_runs_on(device: torch.device) -> bool:
    """Whether there are float8 products on `device`; a CPU emulates them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY


def check_fp8(device: torch.device) -> None:
    """Raise UserError for a GPU without float8 products; tell that a CPU has none either."""
    if device.type == "cpu":
        logger.info("fp8: a CPU emulates float8 products, which is slow")
    if not fp8_runs_on(device):
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
