"""Attention against the written-out one, and the operator around FlashAttention-4."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sgm.modules.transformer.attention import attend, choose_kernel, flash_attention


def written_out(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of (b, n, heads, head_size) and the log-sum-exp (b, heads, n) of its scores."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    result = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)
    return result.contiguous(), scores.logsumexp(dim=-1)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 3, 4, generator=generator).unbind()
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def test_attention_equals_the_written_out_one() -> None:
    query, key, value = tokens()
    assert choose_kernel(query) == "sdpa"  # nothing else runs on a CPU
    found = attend(query, key, value, kernel="sdpa")
    # Float32 rounding of means of numbers of about 1.
    torch.testing.assert_close(found, written_out(query, key, value)[0], rtol=0, atol=1e-6)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4's two functions, as they are called, in plain PyTorch."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool
    ) -> tuple[Tensor, Tensor, None, None, None]:
        assert return_lse
        return *written_out(q, k, v), None, None, None

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        # Autograd does not see inside an operator: the derivative of the softmax by hand.
        assert dout.is_contiguous()
        torch.testing.assert_close(out, written_out(q, k, v)[0])
        scale = q.shape[-1] ** -0.5
        shares = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale - lse[..., None]).exp()
        of_shares = torch.einsum("bqhd,bkhd->bhqk", dout, v)
        mean = (of_shares * shares).sum(dim=-1, keepdim=True)
        of_scores = shares * (of_shares - mean) * scale
        return (
            torch.einsum("bhqk,bkhd->bqhd", of_scores, k),
            torch.einsum("bhqk,bqhd->bkhd", of_scores, q),
            torch.einsum("bhqk,bqhd->bkhd", shares, dout),
        )

    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("flash_on_cpu")
def test_flash_operator_hands_everything_on() -> None:
    inputs = tokens()
    expected = written_out(*inputs)[0]
    found = attend(*inputs, kernel="flash")
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
    found_gradients = torch.autograd.grad((found * weights).sum(), inputs)
    torch.testing.assert_close(
        found_gradients, torch.autograd.grad((expected * weights).sum(), inputs)
    )


@pytest.mark.usefixtures("flash_on_cpu")
def test_flash_operator_keeps_what_torch_compile_relies_on() -> None:
    # Shapes and strides of the stand-ins that compiling uses, and the gradient's registration.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(flash_attention, tokens(), test_utils=checks)
