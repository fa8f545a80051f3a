"""Full attention between tokens: PyTorch's, or what is faster on the GPU at hand."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sgm.distributed import SequenceShare
from sgm.errors import UserError
from sgm.preflight import head_size
from sgm.toolchain import can_compile_kernels

logger = logging.getLogger(__name__)


# What computes the attention: "hopper" is this project's own, "flash" is FlashAttention-4, "sdpa"
# is PyTorch.
Kernel = Literal["hopper", "flash", "sdpa"]
_FASTEST_FIRST: tuple[Kernel, ...] = ("hopper", "flash", "sdpa")
_NEEDS: dict[Kernel, str] = {
    "hopper": "Triton with a C compiler and Python's headers, a Hopper GPU, fp16 or bf16, and "
    "heads of 64",
    "flash": "FlashAttention-4, a Hopper or Blackwell GPU, and fp16 or bf16",
}

_HOPPER, _BLACKWELL = (9, 0), (10, 0)  # compute capabilities
_HOPPER_HEAD_SIZE = 64  # HEAD_SIZE of hopper_attention, which imports Triton


def choose_kernel(tokens: Tensor, *, head_size: int, own: bool = True) -> Kernel:
    """The fastest kernel that there is for tokens of this device and type.

    While gradients are computed it is one that has a backward pass. Without `own` it is not this
    project's.
    """
    allowed = [kernel for kernel in _FASTEST_FIRST if own or kernel != "hopper"]
    return next(kernel for kernel in allowed if _runs(kernel, tokens, head_size))


def list_kernels(tokens: Tensor, *, head_size: int) -> list[Kernel]:
    """All kernels of which `choose_kernel` takes the first."""
    return [kernel for kernel in _FASTEST_FIRST if _runs(kernel, tokens, head_size)]


def _runs(kernel: Kernel, tokens: Tensor, head_size: int) -> bool:
    """Whether there is this kernel for tokens of this device and type."""
    if kernel == "sdpa":
        return True
    if not tokens.is_cuda or tokens.dtype not in (torch.float16, torch.bfloat16):
        return False
    if kernel == "flash":
        return _flash_runs_on(tokens.device)
    # Under autocast norms return float32, so that queries and keys are not what tokens are.
    is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")
    fits = head_size == _HOPPER_HEAD_SIZE
    return is_plain and fits and _hopper_runs_on(tokens.device, tokens.dtype)


@torch.no_grad()
def check_kernel(
    kernel: Kernel, *, head_size: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Find out whether a kernel runs, before anything is loaded for it.

    Raises:
        UserError: it does not; says what it needs.
    """
    if not _runs(kernel, torch.empty(0, dtype=dtype, device=device), head_size):
        raise UserError(
            f"attention: {kernel} does not run here: it needs {_NEEDS[kernel]}; leave attention "
            "out for the fastest that does"
        )


# How many parts of the queries this project's kernel computed on a GPU, and how many of them twice.
_tallies: dict[torch.device, Tensor] = {}


def restart_tally() -> None:
    """Count from here on what this project's kernel computes twice."""
    for tally in _tallies.values():
        tally.zero_()


def share_computed_twice() -> float:
    """Of what this project's kernel computed since the count began; waits for the GPU."""
    counts = [tally.tolist() for tally in _tallies.values()]
    computed, twice = map(sum, zip(*counts, strict=True)) if counts else (0, 0)
    return twice / max(computed, 1)


@functools.lru_cache
def _flash_runs_on(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    return capability in (_HOPPER, _BLACKWELL) and flash_is_installed()


@functools.lru_cache
def _hopper_runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this project's kernel works, which is tried once: its language is still changing."""
    if torch.cuda.get_device_capability(device) != _HOPPER or not can_compile_kernels():
        return False
    generator = torch.Generator().manual_seed(0)  # not the one that something else relies on
    query, key, value = torch.randn(3, 1, 300, 2, _HOPPER_HEAD_SIZE, generator=generator)
    query[..., 1, :] *= 1000  # so that most of the second head is computed twice
    inputs = [tensor.to(device, dtype) for tensor in (query, key, value)]
    lacking = None
    try:
        found, _ = hopper_attention(*inputs)
        expected = attend(*inputs, kernel="sdpa")
        # Each is off by up to a unit of the values, which are up to 4.
        if not torch.allclose(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps):
            lacking = "its results are off"
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as fault:  # of any kind, from Triton's compiler to the driver
        lacking = f"{type(fault).__name__}: {fault}".splitlines()[0]
    restart_tally()  # the trial is none of the video's
    if lacking:
        logger.warning("attention without the kernel of our own, so it is slower: %s", lacking)
    else:
        logger.info("attention by the kernel of our own")
    return lacking is None


def flash_is_installed() -> bool:
    """Whether FlashAttention-4 can be imported; older releases lack this part of the package."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # of flash_attn itself
        return False


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: Kernel,
    share: SequenceShare | None = None,
) -> Tensor:
    """Attention without mask or dropout, (b, n, heads, head_size) each and for the result.

    With a `share`, n counts this process's tokens, which attend to those of all processes.
    """
    if share is not None:
        own_heads = [share.to_heads(tensor) for tensor in (query, key, value)]
        return share.to_tokens(attend(*own_heads, kernel=kernel))
    if kernel != "sdpa":
        return _OPERATORS[kernel](query, key, value)[0]
    # Each head is a batch of its own there: (b, heads, n, head_size).
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def attend_branches(
    text: Sequence[Tensor], video: Sequence[Tensor], *, kernel: Literal["hopper", "flash"]
) -> Tensor:
    """Attention where k branches of guidance have a text each, and all the same video tokens.

    The attention among video tokens is computed once, and joined with that to each text; without a
    gradient. Not by PyTorch's function, which does not return the log-sum-exp.

    Args:
        text: query, key and value (k * b, n_text, heads, head_size), branch after branch.
        video: query, key and value (b, n_video, heads, head_size).
        kernel: what computes it.

    Returns:
        (k * b, n_text + n_video, heads, head_size).
    """
    (text_query, *text_key_value), (video_query, *video_key_value) = text, video
    attention = _OPERATORS[kernel]
    k = len(text_query) // len(video_query)
    to_text, to_text_sum = attention(video_query.repeat(k, 1, 1, 1), *text_key_value)
    of_video = _join(
        (to_text.unflatten(0, (k, -1)), to_text_sum.unflatten(0, (k, -1))),
        attention(video_query, *video_key_value),
    )  # (k, b, n_video, heads, head_size)
    # To its video the texts of a clip are as one, so that no branch needs a copy of it.
    queries = rearrange(text_query, "(k b) n heads d -> b (k n) heads d", k=k)
    to_video, to_video_sum = attention(queries, *video_key_value)
    of_text = _join(
        attention(text_query, *text_key_value),
        (
            rearrange(to_video, "b (k n) heads d -> (k b) n heads d", k=k),
            rearrange(to_video_sum, "b heads (k n) -> (k b) heads n", k=k),
        ),
    )
    return torch.cat([of_text, of_video.flatten(0, 1)], dim=1)


def _join(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to two sets of keys at once, from the attention to each, (…, n, heads, head_size).

    With each comes the log-sum-exp of its scores (…, heads, n), the logarithm of its weight.
    Source: Dao et al., "FlashAttention", section 3.1.
    """
    (result, log_sum_exp), (other, other_log_sum_exp) = first, second
    share = torch.sigmoid(other_log_sum_exp - log_sum_exp).transpose(-1, -2)[..., None]
    return torch.lerp(result, other, share.to(result.dtype))


@torch.library.custom_op("cogvideox::hopper_attention", mutates_args=())
def hopper_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """This project's kernel as an operator; like `flash_attention`, but without a gradient."""
    from sgm.modules.transformer.hopper_attention import attend_on_hopper

    if query.device not in _tallies:
        _tallies[query.device] = torch.zeros(2, dtype=torch.int64, device=query.device)
    return attend_on_hopper(query, key, value, tally=_tallies[query.device])


@torch.library.custom_op("cogvideox::flash_attention", mutates_args=())
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-4: the result (b, n, heads, head_size), log-sum-exp (b, heads, n) float32.

    An operator of its own, so that `torch.compile` takes it as a whole and checkpointing can keep
    its result. Source: Shah et al., "FlashAttention-3" (Hopper), and its successor for Blackwell.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    result, log_sum_exp, *_ = _flash_attn_fwd(query, key, value, return_lse=True)
    return result, log_sum_exp


@hopper_attention.register_fake
@flash_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    b, n, heads, _ = query.shape
    result = query.new_empty((b, n, heads, value.shape[-1]))
    return result, query.new_empty((b, heads, n), dtype=torch.float32)


@torch.library.custom_op("cogvideox::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given that of the result."""
    from flash_attn.cute.interface import _flash_attn_bwd

    of_query, of_key, of_value = _flash_attn_bwd(
        query, key, value, result, gradient.contiguous(), log_sum_exp
    )
    return of_query, of_key, of_value


@flash_attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, gradient: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return flash_attention_backward(gradient, *ctx.saved_tensors)


flash_attention.register_autograd(_backward, setup_context=_save_for_backward)

_OPERATORS = {"hopper": hopper_attention, "flash": flash_attention}

# The operators whose results checkpointing can keep; which of them PyTorch calls, it decides.
ATTENTION_OPERATORS = frozenset(
    {
        torch.ops.cogvideox.flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def check_attention(choice: str, model: Mapping[str, Any], **where: Any) -> None:
    """Find out whether the kernel of attention that `args` ask for runs; one for "auto" does.

    Args:
        choice: "auto", or the name of a kernel.
        model: the `model` section.
        where: `device` and `dtype` of the network.

    Raises:
        UserError: it does not; says what it needs. Or as in `head_size`.
    """
    width = head_size(model)
    if choice != "auto":
        check_kernel(choice, head_size=width, **where)
