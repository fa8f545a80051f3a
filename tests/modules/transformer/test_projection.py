"""Projections part by part are what SAT's own layers compute."""

from __future__ import annotations

import pytest
import torch
from sat.model.finetune.lora2 import LoraLinear
from sat.model.transformer import ColumnParallelLinear, RowParallelLinear
from torch import nn

from sgm.modules.transformer.projection import project, sum_of_linears
from sgm.modules.transformer.sat_runtime import ensure_process_groups

WIDTH = 8


def layer(num_parts: int, *, lora: bool) -> nn.Module:
    """SAT's Linear of a query_key_value (three parts) or a dense (one), with noise for weights."""
    ensure_process_groups()
    torch.manual_seed(0)
    if num_parts == 1:
        linear = RowParallelLinear(WIDTH, WIDTH, input_is_parallel=True)
    else:
        linear = ColumnParallelLinear(WIDTH, 3 * WIDTH, stride=3, gather_output=False)
    if lora:
        sizes = (WIDTH, num_parts * WIDTH)
        linear = LoraLinear(
            type(linear), num_parts, *sizes, r=2, lora_alpha=3.0, original_obj=linear
        )
    with torch.no_grad():
        for weight in linear.parameters():
            weight.normal_()
    return linear


@pytest.mark.parametrize("num_parts", [3, 1])
@pytest.mark.parametrize("lora", [False, True])
def test_parts_are_those_of_the_layer(num_parts: int, lora: bool) -> None:
    linear = layer(num_parts, lora=lora)
    x = torch.randn(2, 5, WIDTH)
    parts = project(linear, x, num_parts=num_parts)
    assert len(parts) == num_parts
    # Sums in another order, of numbers up to about 50.
    torch.testing.assert_close(torch.cat(parts, dim=-1), linear(x), rtol=1e-5, atol=3e-5)


def test_weights_that_zero_3_divides_are_read_by_the_layer_itself() -> None:
    linear = layer(3, lora=False)
    linear.weight.ds_id = 0  # as DeepSpeed marks them
    calls = []
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    project(linear, torch.randn(1, 2, WIDTH), num_parts=3)
    assert calls


def test_under_autocast_the_layer_itself_is_called() -> None:
    linear = layer(3, lora=True)
    with torch.autocast("cpu", torch.bfloat16):
        parts = project(linear, torch.randn(1, 2, WIDTH), num_parts=3)
    assert [part.dtype for part in parts] == [torch.bfloat16] * 3


@pytest.mark.parametrize("trained", [(0, 3, 4), (0, 1, 2, 3, 4), (4,)])
def test_sum_of_linears_and_its_gradients_are_the_plain_ones(trained: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    shapes = [(2, 5, 6), (9, 6), (9,), (2, 5, 4), (9, 4)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs = [tensor.requires_grad_(i in trained) for i, tensor in enumerate(inputs)]
    x, weight, bias, low, up = inputs
    result, expected = sum_of_linears(*inputs), x @ weight.T + bias + low @ up.T
    torch.testing.assert_close(result, expected)
    upstream, wanted = torch.randn_like(expected), [inputs[i] for i in trained]
    gradients = torch.autograd.grad(result, wanted, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted, upstream))
    torch.library.opcheck(sum_of_linears, tuple(inputs))
