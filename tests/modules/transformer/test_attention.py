"""Attention against the written-out one, and the operators around kernels for a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.transformer import attention
from sgm.modules.transformer.attention import (
    attend,
    attend_branches,
    check_attention,
    flash_attention,
    hopper_attention,
    list_kernels,
)
from tests.plain_attention import written_out

HEADS_OF_64 = {"network_config": {"params": {"hidden_size": 128, "num_attention_heads": 2}}}


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 3, 4, generator=generator).unbind()
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def test_attention_equals_the_written_out_one() -> None:
    query, key, value = tokens()
    assert list_kernels(query, head_size=4)[0] == "sdpa"  # nothing else runs on a CPU
    found = attend(query, key, value, kernel="sdpa")
    # Float32 rounding of means of numbers of about 1.
    torch.testing.assert_close(found, written_out(query, key, value)[0], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("kernel_calls")
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


@pytest.mark.usefixtures("kernel_calls")
def test_flash_operator_keeps_what_torch_compile_relies_on() -> None:
    # Shapes and strides of the stand-ins that compiling uses, and the gradient's registration.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(flash_attention, tokens(), test_utils=checks)


@pytest.mark.usefixtures("kernel_calls")
def test_own_operator_keeps_what_torch_compile_relies_on() -> None:
    inputs = tuple(tensor.detach() for tensor in tokens())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(hopper_attention, inputs, test_utils=checks)
    torch.testing.assert_close(attend(*inputs, kernel="hopper"), written_out(*inputs)[0])


@pytest.mark.usefixtures("kernel_calls")
def test_own_operator_has_no_gradient() -> None:
    with pytest.raises(RuntimeError, match="autograd"):
        attend(*tokens(), kernel="hopper").sum().backward()


def test_own_kernel_is_not_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(type="cuda")
    half = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=device)
    single = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=device)
    monkeypatch.setattr(attention, "_flash_runs_on", lambda device: True)
    monkeypatch.setattr(attention, "_hopper_runs_on", lambda device, dtype: True)
    assert list_kernels(half, head_size=64) == ["flash", "sdpa"]
    with torch.no_grad():
        assert list_kernels(half, head_size=64) == ["hopper", "flash", "sdpa"]
        assert list_kernels(half, head_size=32) == ["flash", "sdpa"]
        assert list_kernels(single, head_size=64) == ["sdpa"]
        assert list_kernels(tokens()[0], head_size=64) == ["sdpa"]
        assert list_kernels(half, head_size=64)[0] == "hopper"
        assert list_kernels(half, head_size=64, own=False)[0] == "flash"
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda device_type: True)
            assert list_kernels(half, head_size=64) == ["flash", "sdpa"]
        monkeypatch.setattr(attention, "_flash_runs_on", lambda device: False)
        assert list_kernels(half, head_size=64) == ["hopper", "sdpa"]
    assert list_kernels(half, head_size=64) == ["sdpa"]


@pytest.mark.parametrize(
    ("kernel", "needed"),
    [("hopper", "a C compiler .* heads of width 64"), ("flash", "FlashAttention-4")],
)
def test_a_kernel_that_does_not_run_is_refused_with_what_it_needs(kernel: str, needed: str) -> None:
    half = {"device": torch.device("cpu"), "dtype": torch.float16}
    check_attention("sdpa", HEADS_OF_64, **half)
    check_attention("auto", HEADS_OF_64, **half)
    with pytest.raises(UserError, match=f"{kernel} does not run here: it needs .*{needed}"):
        check_attention(kernel, HEADS_OF_64, **half)


def test_own_kernel_is_not_tried_where_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_flash_runs_on", lambda device: True)
    monkeypatch.setattr(attention, "_hopper_runs_on", lambda *_: pytest.fail("tried"))
    half = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: half)
    for kernel in ("sdpa", "flash"):
        check_attention(kernel, HEADS_OF_64, device=half.device, dtype=half.dtype)
    with torch.no_grad():
        assert list_kernels(half, head_size=64, own=False)[0] == "flash"


@pytest.mark.usefixtures("kernel_calls")
@pytest.mark.parametrize("num_branches", [2, 3])
@pytest.mark.parametrize("num_clips", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # scores of up to 1e4: some weights vanish
def test_branches_join_to_the_attention_of_each(
    num_clips: int, num_branches: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"dtype": torch.float64, "generator": generator}
    text = scale * torch.randn(3, num_branches * num_clips, 3, 2, 4, **sizes)
    video = scale * torch.randn(3, num_clips, 7, 2, 4, **sizes)
    found = attend_branches(text, video, kernel="flash")
    for branch, of_branch in enumerate(text.chunk(num_branches, dim=1)):
        expected, _ = written_out(*torch.cat([of_branch, video], dim=2))
        torch.testing.assert_close(found.chunk(num_branches)[branch], expected)


@pytest.mark.usefixtures("kernel_calls")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_branches_join_is_within_a_unit_of_the_exact_attention(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 2, 5, 3, 8, generator=generator).to(dtype)
    video = torch.randn(3, 1, 33, 3, 8, generator=generator).to(dtype)
    found = attend_branches(text, video, kernel="flash").double()
    whole = torch.cat([text, video.repeat(1, 2, 1, 1, 1)], dim=2).double()
    exact, _ = written_out(*whole)
    # Results are means of values of about 1; the tolerance is one unit of such a value.
    assert (found - exact).abs().max() <= torch.finfo(dtype).eps


def test_fallback_ratio_counts_from_the_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_tallies", {})
    attention.restart_tally()
    assert attention.fallback_ratio() == 0
    attention._tallies[torch.device("cpu")] = tally = torch.tensor([5, 5])
    attention.restart_tally()
    assert attention.fallback_ratio() == 0
    tally += torch.tensor([8, 2])
    assert attention.fallback_ratio() == 0.25
