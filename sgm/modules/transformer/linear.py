"""Linear layers of the blocks: projections in parts, the MLP's GELU, and float8 products.

The functions here compute SAT's Linears, and the LoRA layers that replace them, in a way that is
fast in compiled code.

Float8 is lossy. It is used only for the matrix products of the MLPs, on GPUs that support it. Both
factors of a product are rounded to e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning",
2022), which has 4 significant bits. Each weight row (output channel) and each token has its own
scale, which maps its largest absolute value to the largest value of e4m3. The MLP does two thirds
of a block's multiplications with weights. The projections of the attention are not rounded, because
this would change the result of the bundled model far more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseModel
from torch import Tensor, nn

from sgm.errors import UserError

logger = logging.getLogger(__name__)


def project(linear: nn.Module, x: Tensor, *, num_parts: int) -> list[Tensor]:
    """Return ``linear(x)`` in `num_parts` equal parts along its last axis.

    The parts are computed one by one. Splitting the whole result, and concatenating the gradients
    of the parts, would copy a large tensor.

    Args:
        linear: SAT's Linear, which has a bias, or a LoRA layer that wraps such a Linear.
        x: (b, n, d).
        num_parts: number of parts.
    """
    base = getattr(linear, "original", linear)
    is_lora = base is not linear
    # Call the module in two cases. ZeRO-3 gathers the weights only during a call of their module.
    # Autocast casts the inputs of PyTorch's operators, but not those of `lora_linear`.
    is_divided = hasattr(base.weight, "ds_id")
    if is_divided or (is_lora and torch.is_autocast_enabled(x.device.type)):
        return list(linear(x).chunk(num_parts, dim=-1))
    if not is_lora:
        weights, biases = base.weight.chunk(num_parts), base.bias.chunk(num_parts)
        return [F.linear(x, *part) for part in zip(weights, biases, strict=True)]
    lora: Any = linear  # SAT's layer has no types
    down = torch.cat(tuple(lora.matrix_A)) * lora.scaling
    dropped = lora.lora_dropout(x) if lora.training else x
    ups = list(lora.matrix_B)
    *parts, _ = lora_linear(x, None if dropped is x else dropped, base.weight, base.bias, down, ups)
    return parts


@torch.library.custom_op("cogvideox::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor, down: Tensor, ups: list[Tensor]
) -> list[Tensor]:
    """Return ``W x + bias + B A x``, a Linear with LoRA, in parts (Hu et al., "LoRA", section 4.1).

    PyTorch's operators would write both products to memory, and read them again to add them. Here
    the second matrix product adds its result to the first one directly. There is no second
    derivative.

    Args:
        x: (…, d).
        dropped: `x` after dropout, the input of A; None if there is no dropout.
        weight, bias: (parts * e, d) and (parts * e,).
        down: the concatenated A of all parts, times the scale of LoRA, (parts * r, d).
        ups: B for each part, (e, r).

    Returns:
        The parts, (…, e) each, followed by ``A x``, (rows of x, parts * r). The backward pass needs
        this last entry, which has no gradient itself.
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
    """Return ``lefts[0] @ rights[0] + lefts[1] @ rights[1] + …``, summed as in `lora_linear`."""
    total = lefts[0] @ rights[0]
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        total.addmm_(left, right)
    return total


@sum_of_products.register_fake
def _(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    return lefts[0].new_empty((lefts[0].shape[0], rights[0].shape[1]))


_HALF = (torch.float16, torch.bfloat16)


def activated(linear: nn.Module, x: Tensor, *, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``activation(linear(x))`` for a GELU (tanh approximation), (b, n, d) → (b, n, 4d).

    On a GPU, the matrix product applies the GELU to its float32 sums before it rounds them. This
    saves a pass over the largest tensor of a block. It is not done for weights that are trained,
    because the backward pass needs the values before the GELU.
    """
    weight = linear.weight
    is_constant = not (torch.is_grad_enabled() and weight.requires_grad)
    # ZeRO-3 gathers the weights only during a call of their module.
    is_whole = isinstance(linear.bias, Tensor) and not hasattr(weight, "ds_id")
    if is_constant and is_whole and weight.is_cuda and weight.dtype in _HALF:
        return linear_gelu(x, weight, linear.bias)
    return activation(linear(x))


@torch.library.custom_op("cogvideox::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU (tanh approximation) of ``x weight^T + bias``: x (…, d), weight (e, d) → (…, e).

    Only `x` gets a gradient; the PyTorch operator used here has no gradient at all.
    """
    if not x.is_cuda:  # on a CPU, `_addmm_activation` computes the exact GELU
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
_SMALLEST_PEAK = 1e-12  # lower limit of a row's largest value: avoids a scale of zero
_CAPABILITY = (8, 9)  # Ada is the first generation with float8 products


class Fp8Linear(nn.Module):
    """A Linear (k → n channels) that multiplies float8 factors; for inference.

    The product and the bias are always bfloat16, whatever the dtype of the run: with scales per
    row, PyTorch supports no other dtype on all GPUs. A GPU sums with fewer bits than float32 ("fast
    accumulation"). A CPU multiplies the same factors in float32.

    Args:
        linear: the Linear whose weight (n, k) and bias (n,) are converted. On a GPU, n and k must
            be multiples of 16; they are, because the position table checks `hidden_size`.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight, scale = to_float8(linear.weight.detach())
        bias = linear.bias.detach().bfloat16()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (n, k)
        self.scale = nn.Parameter(scale, requires_grad=False)  # (n, 1)
        self.bias = nn.Parameter(bias, requires_grad=False)  # (n,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result (…, n) for `x` (…, k), in the dtype of `x`."""
        tokens, token_scale = to_float8(x.flatten(0, -2))  # (m, k), (m, 1)
        if tokens.is_cuda:
            product = torch._scaled_mm(
                tokens,
                self.weight.t(),
                scale_a=token_scale,
                scale_b=self.scale.t(),
                bias=self.bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )  # (m, n)
        else:
            product = tokens.float() @ self.weight.float().t()
            product = (product * token_scale * self.scale.t() + self.bias).bfloat16()
        return product.unflatten(0, x.shape[:-1]).to(x.dtype)


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8 factors (m, k) and float32 scales (m, 1); their product is `rows`, rounded."""
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_PEAK) / LARGEST
    return (rows / scale).to(FLOAT8), scale


def fp8_runs_on(device: torch.device) -> bool:
    """Return whether float8 products run on `device`; a CPU emulates them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY


def check_fp8(device: torch.device) -> None:
    """Check that float8 products run on `device`. If it is a CPU, log that it emulates them.

    Raises:
        UserError: the GPU does not support float8 products.
    """
    if device.type == "cpu":
        logger.info("fp8: a CPU emulates float8 products, which is slow")
    if not fp8_runs_on(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"fp8: {name} does not support float8 (Ada and newer GPUs do); leave fp8 out"
        )


def quantize_linears(network: BaseModel) -> None:
    """Replace both Linears of each block's MLP by `Fp8Linear`."""
    for layer in network.transformer.layers:
        layer.mlp.dense_h_to_4h = Fp8Linear(layer.mlp.dense_h_to_4h)
        layer.mlp.dense_4h_to_h = Fp8Linear(layer.mlp.dense_4h_to_h)
