"""Attention as its formula is written, in place of the kernels for a GPU where there is none."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor


def written_out(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of (b, n, heads, head_size) and the log-sum-exp (b, heads, n) of its scores."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    result = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)
    return result.contiguous(), scores.logsumexp(dim=-1)


def replace_kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Plain PyTorch in place of FlashAttention-4's two functions and of this project's kernel.

    Returns:
        What each forward call was given: the batch's size, the number of queries and of keys.
    """
    calls: list[tuple[int, int, int]] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool
    ) -> tuple[Tensor, Tensor, None, None, None]:
        assert return_lse
        calls.append((len(q), q.shape[1], k.shape[1]))
        # Of half precision only the result is rounded.
        result, log_sum_exp = written_out(q.double(), k.double(), v.double())
        sum_dtype = torch.promote_types(q.dtype, torch.float32)
        return result.to(q.dtype), log_sum_exp.to(sum_dtype), None, None, None

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
    own = ModuleType("sgm.modules.transformer.hopper_attention")
    own.attend_on_hopper = lambda *inputs, tally: forward(*inputs, return_lse=True)[:2]
    monkeypatch.setitem(sys.modules, own.__name__, own)
    return calls
