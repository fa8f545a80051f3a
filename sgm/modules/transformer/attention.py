"""Full attention between tokens: PyTorch's own, or FlashAttention-4 where that is installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sgm.parallel.sequence import SequenceShare

# What computes the attention: "flash" is FlashAttention-4, "sdpa" is PyTorch.
Kernel = Literal["flash", "sdpa"]

_FLASH_CAPABILITIES = ((9, 0), (10, 0))  # Hopper and Blackwell, for which it is written


def choose_kernel(tokens: Tensor) -> Kernel:
    """The fastest kernel that there is for tokens of this device and type."""
    half = tokens.dtype in (torch.float16, torch.bfloat16)
    return "flash" if half and tokens.is_cuda and _flash_runs_on(tokens.device) else "sdpa"


@functools.lru_cache
def _flash_runs_on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in _FLASH_CAPABILITIES and flash_is_installed()


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
    if kernel == "flash":
        return flash_attention(query, key, value)[0]
    # Each head is a batch of its own there: (b, heads, n, head_size).
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def attend_branches(text: Sequence[Tensor], video: Sequence[Tensor]) -> Tensor:
    """Attention where k branches of guidance have a text each, and all the same video tokens.

    The attention among video tokens is computed once, and joined with that to each text. Always by
    FlashAttention-4, since PyTorch's function does not return the log-sum-exp; without a gradient.

    Args:
        text: query, key and value (k * b, n_text, heads, head_size), branch after branch.
        video: query, key and value (b, n_video, heads, head_size).

    Returns:
        (k * b, n_text + n_video, heads, head_size).
    """
    (text_query, *text_key_value), (video_query, *video_key_value) = text, video
    k = len(text_query) // len(video_query)
    to_text, to_text_sum = flash_attention(video_query.repeat(k, 1, 1, 1), *text_key_value)
    of_video = _join(
        (to_text.unflatten(0, (k, -1)), to_text_sum.unflatten(0, (k, -1))),
        flash_attention(video_query, *video_key_value),
    )  # (k, b, n_video, heads, head_size)
    # To its video the texts of a clip are as one, so that no branch needs a copy of it.
    queries = rearrange(text_query, "(k b) n heads d -> b (k n) heads d", k=k)
    to_video, to_video_sum = flash_attention(queries, *video_key_value)
    of_text = _join(
        flash_attention(text_query, *text_key_value),
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


@torch.library.custom_op("cogvideox::flash_attention", mutates_args=())
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-4: the result (b, n, heads, head_size), log-sum-exp (b, heads, n) float32.

    An operator of its own, so that `torch.compile` takes it as a whole and checkpointing can keep
    its result. Source: Shah et al., "FlashAttention-3" (Hopper), and its successor for Blackwell.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    result, log_sum_exp, *_ = _flash_attn_fwd(query, key, value, return_lse=True)
    return result, log_sum_exp


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
