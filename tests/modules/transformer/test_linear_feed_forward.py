"""The Linear with its GELU as one operator: its result, its gradient, and when it is used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.transformer.linear import activated, linear_gelu


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)


def test_result_and_gradient_equal_the_plain_ones(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = tensors
    result, expected = linear_gelu(x, weight, bias), plain(x, weight, bias)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(result, x, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(gradient, expected_gradient)
    torch.library.opcheck(linear_gelu, (x, weight, bias))


class OnGPU(nn.Module):
    """A Linear whose weight says that it is one of half precision on a GPU."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.weight = SimpleNamespace(
            is_cuda=True, dtype=torch.float16, requires_grad=trained, T=torch.ones(6, 9)
        )
        self.bias = torch.zeros(9)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("trained", [False, True])
def test_weights_that_are_trained_go_the_plain_way(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = []
    monkeypatch.setattr(
        "sgm.modules.transformer.linear.linear_gelu", lambda *inputs: fused.append(inputs)
    )
    linear, x = OnGPU(trained=trained), torch.randn(2, 6)
    activated(linear, x, activation=F.gelu)
    assert len(fused) == (0 if trained else 1)
    fused.clear()
    with torch.no_grad():
        activated(linear, x, activation=F.gelu)
    assert len(fused) == 1


def test_on_a_cpu_the_module_itself_is_called() -> None:
    linear, x = nn.Linear(6, 9), torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(activated(linear, x, activation=F.gelu), F.gelu(linear(x)))
