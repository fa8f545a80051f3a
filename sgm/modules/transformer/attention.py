"""Full attention between tokens, by PyTorch or by a kernel that is faster on the GPU."""

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

from sgm.distributed import SequenceShard
from sgm.errors import UserError
from sgm.preflight import head_size
from sgm.toolchain import can_compile_kernels

logger = logging.getLogger(__name__)


# Kernels of the attention: "hopper" is this project's own (hopper_attention.py), "flash" is
# FlashAttention-4, "sdpa" is PyTorch.
Kernel = Literal["hopper", "flash", "sdpa"]
_FASTEST_FIRST: tuple[Kernel, ...] = ("hopper", "flash", "sdpa")
_NEEDS: dict[Kernel, str] = {
    "hopper": "Triton with a C compiler and Python's headers, a Hopper GPU, fp16 or bf16, and "
    "heads of 64",
    "flash": "FlashAttention-4, a Hopper or Blackwell GPU, and fp16 or bf16",
}

_HOPPER, _BLACKWELL = (9, 0), (10, 0)  # compute capabilities
_HOPPER_HEAD_SIZE = 64  # HEAD_SIZE of hopper_attention, whose import needs Triton


def list_kernels(tokens: Tensor, *, head_size: int, own: bool = True) -> list[Kernel]:
    """Return the kernels that run for tokens of this device and type, fastest first.

    While gradients are enabled, they are those with a backward pass. Without `own`, this project's
    Hopper kernel is left out.
    """
    allowed = [kernel for kernel in _FASTEST_FIRST if own or kernel != "hopper"]
    return [kernel for kernel in allowed if _runs(kernel, tokens, head_size)]


def _runs(kernel: Kernel, tokens: Tensor, head_size: int) -> bool:
    """Whether this kernel runs for tokens of this device and type."""
    if kernel == "sdpa":
        return True
    if not tokens.is_cuda or tokens.dtype not in (torch.float16, torch.bfloat16):
        return False
    if kernel == "flash":
        return _flash_runs_on(tokens.device)
    # Under autocast, norms return float32, so queries and keys have another type than the tokens.
    is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")
    fits = head_size == _HOPPER_HEAD_SIZE
    return is_plain and fits and _hopper_runs_on(tokens.device, tokens.dtype)


@torch.no_grad()
def check_attention(
    choice: Kernel | Literal["auto"],
    model: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Check that the selected kernel runs, before anything is loaded; "auto" always does.

    Args:
        choice: "auto", or the name of a kernel.
        model: the `model` section.
        device: device of the network.
        dtype: type of the network's weights.

    Raises:
        UserError: the kernel does not run; the message says what it needs. Or as in `head_size`.
    """
    width = head_size(model)
    if choice == "auto" or _runs(choice, torch.empty(0, dtype=dtype, device=device), width):
        return
    raise UserError(
        f"attention: {choice} does not run here: it needs {_NEEDS[choice]}; leave attention out "
        "for the fastest kernel that does"
    )


# Per GPU: how many parts of the queries the Hopper kernel computed, and how many by its fallback.
_tallies: dict[torch.device, Tensor] = {}


def restart_tally() -> None:
    """Set the counts of `fallback_ratio` to zero."""
    for tally in _tallies.values():
        tally.zero_()


def fallback_ratio() -> float:
    """Return the fraction of the Hopper kernel's work that its fallback did; waits for the GPU."""
    counts = [tally.tolist() for tally in _tallies.values()]
    computed, by_fallback = map(sum, zip(*counts, strict=True)) if counts else (0, 0)
    return by_fallback / max(computed, 1)


@functools.lru_cache
def _flash_runs_on(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    return capability in (_HOPPER, _BLACKWELL) and flash_is_installed()


@functools.lru_cache
def _hopper_runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Hopper kernel works. It is tried once, because its language still changes."""
    if torch.cuda.get_device_capability(device) != _HOPPER or not can_compile_kernels():
        return False
    generator = torch.Generator().manual_seed(0)  # leaves the global one alone
    query, key, value = torch.randn(3, 1, 300, 2, _HOPPER_HEAD_SIZE, generator=generator)
    query[..., 1, :] *= 1000  # so that the fallback computes most of the second head
    inputs = [tensor.to(device, dtype) for tensor in (query, key, value)]
    problem = None
    try:
        found, _ = hopper_attention(*inputs)
        expected = attend(*inputs, kernel="sdpa")
        # Each has an error of up to one unit in the last place of values up to 4.
        if not torch.allclose(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps):
            problem = "its results differ from PyTorch's"
    except torch.OutOfMemoryError:  # says nothing about the kernel itself
        raise
    except Exception as error:  # of any kind, from Triton's compiler to the driver
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    restart_tally()  # the trial does not count
    if problem:
        logger.warning("attention is slower, because the Hopper kernel does not work: %s", problem)
    else:
        logger.info("attention uses the Hopper kernel of this project")
    return problem is None


def flash_is_installed() -> bool:
    """Whether FlashAttention-4 can be imported; older releases do not have this subpackage."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # there is no flash_attn at all
        return False


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, kernel: Kernel, shard: SequenceShard | None = None
) -> Tensor:
    """Return the attention without mask or dropout; all tensors are (b, n, heads, head_size).

    With a `shard`, n counts this process's tokens, which attend to the tokens of all processes.
    """
    if shard is not None:
        own_heads = [shard.to_heads(tensor) for tensor in (query, key, value)]
        return shard.to_tokens(attend(*own_heads, kernel=kernel))
    if kernel != "sdpa":
        return _OPERATORS[kernel](query, key, value)[0]
    # PyTorch takes the heads as a batch dimension: (b, heads, n, head_size).
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend_branches(
    text: Sequence[Tensor], video: Sequence[Tensor], *, kernel: Literal["hopper", "flash"]
) -> Tensor:
    """Return the attention of k branches of guidance with one text each and the same video tokens.

    The attention among video tokens is computed once and joined with the attention to each text.
    There is no gradient. PyTorch's kernel cannot do this, because it does not return the
    log-sum-exp.

    Args:
        text: query, key and value (k * b, n_text, heads, head_size), branch after branch.
        video: query, key and value (b, n_video, heads, head_size).
        kernel: the kernel to use.

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
    # All texts of a clip attend to its video as one sequence, so that no branch copies the video.
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
    """Join the attention to two sets of keys, (…, n, heads, head_size), to that to their union.

    Each comes with the log-sum-exp of its scores (…, heads, n), the logarithm of its weight.
    Source: Dao et al., "FlashAttention", section 3.1.
    """
    (result, log_sum_exp), (other, other_log_sum_exp) = first, second
    fraction = torch.sigmoid(other_log_sum_exp - log_sum_exp).transpose(-1, -2)[..., None]
    return torch.lerp(result, other, fraction.to(result.dtype))


@torch.library.custom_op("cogvideox::hopper_attention", mutates_args=())
def hopper_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """This project's Hopper kernel as an operator; as `flash_attention`, but without a gradient."""
    from sgm.modules.transformer.hopper_attention import attend_on_hopper

    if query.device not in _tallies:
        _tallies[query.device] = torch.zeros(2, dtype=torch.int64, device=query.device)
    return attend_on_hopper(query, key, value, tally=_tallies[query.device])


@torch.library.custom_op("cogvideox::flash_attention", mutates_args=())
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-4: the result (b, n, heads, head_size), log-sum-exp (b, heads, n) float32.

    It is a custom operator, so that `torch.compile` does not trace into it and activation
    checkpointing can store its result. Source: Shah et al., "FlashAttention-3" (Hopper), and its
    successor for Blackwell.
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
    """Return the gradients of query, key and value, given the gradient of the result."""
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

# The operators whose results activation checkpointing can store. PyTorch selects one of its own.
ATTENTION_OPERATORS = [
    torch.ops.cogvideox.flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
