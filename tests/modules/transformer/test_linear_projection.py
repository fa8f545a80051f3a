"""Projections part by part are what SAT's own layers compute."""

from __future__ import annotations

import pytest
import torch
from sat.model.finetune.lora2 import LoraLinear
from sat.model.transformer import ColumnParallelLinear, RowParallelLinear
from torch import nn

from sgm.modules.transformer.linear import lora_linear, project, sum_of_products
from sgm.sat_runtime import ensure_process_groups

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


WEIGHTS = ("x", "dropped", "weight", "bias", "down", "up of 0", "up of 1")


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("trained", [("x", "down", "up of 0", "up of 1"), WEIGHTS, ("up of 1",)])
def test_operator_and_its_gradients_are_the_plain_ones(
    trained: tuple[str, ...], with_dropout: bool
) -> None:
    torch.manual_seed(0)
    shapes = [(2, 5, 6), (2, 5, 6), (18, 6), (18,), (8, 6), (9, 4), (9, 4)]
    tensors = {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=name in trained)
        for name, shape in zip(WEIGHTS, shapes, strict=True)
        if with_dropout or name != "dropped"
    }
    x, dropped, weight, bias, down, *ups = (tensors.get(name) for name in WEIGHTS)
    inputs = (x, dropped, weight, bias, down, ups)
    *parts, _ = lora_linear(*inputs)
    low = (x if dropped is None else dropped) @ down.T
    whole = x @ weight.T + bias
    expected = [
        part + part_low @ up.T
        for part, part_low, up in zip(whole.chunk(2, -1), low.chunk(2, -1), ups, strict=True)
    ]
    torch.testing.assert_close(parts, expected)
    upstream = torch.randn(2, 2, 5, 9, dtype=torch.float64)
    wanted = [tensors[name] for name in trained if name in tensors]
    gradients, expected_gradients = (
        torch.autograd.grad((torch.stack(found) * upstream).sum(), wanted)
        for found in (parts, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients)
    torch.library.opcheck(lora_linear, inputs)
    lefts = [upstream[i].flatten(0, -2) for i in range(2)]
    rights = [part.detach() for part in weight.chunk(2)]
    torch.library.opcheck(sum_of_products, (lefts, rights))


def test_dropout_is_in_front_of_the_low_rank_part_alone() -> None:
    linear, x = layer(3, lora=True), torch.randn(2, 5, WIDTH)
    linear.lora_dropout = nn.Dropout(0.5)
    torch.manual_seed(1)
    expected = linear(x)
    torch.manual_seed(1)
    parts = project(linear, x, num_parts=3)
    torch.testing.assert_close(torch.cat(parts, dim=-1), expected, rtol=1e-5, atol=3e-5)
    linear.eval()
    parts = project(linear, x, num_parts=3)
    torch.testing.assert_close(torch.cat(parts, dim=-1), linear(x), rtol=1e-5, atol=3e-5)
