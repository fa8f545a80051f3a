"""Full attention between tokens, by PyTorch or by a faster GPU kernel."""

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


# Attention kernels: "hopper" is this project's own (hopper_attention.py), "flash" is
# FlashAttention-4, "sdpa" is PyTorch.
Kernel = Literal["hopper", "flash", "sdpa"]
_FASTEST_FIRST: tuple[Kernel, ...] = ("hopper", "flash", "sdpa")
_NEEDS: dict[Kernel, str] = {
    "hopper": "Triton with a C compiler and Python's headers, a Hopper GPU, fp16 or bf16, and "
    "attention heads of width 64",
    "flash": "FlashAttention-4, a Hopper or Blackwell GPU, and fp16 or bf16",
}

_HOPPER, _BLACKWELL = (9, 0), (10, 0)  # compute capabilities
_HOPPER_HEAD_SIZE = 64  # a copy of hopper_attention.HEAD_SIZE, which cannot be read without Triton


def list_kernels(tokens: Tensor, *, head_size: int, own: bool = True) -> list[Kernel]:
    """Return the kernels that support the device and dtype of `tokens`, fastest first.

    While gradients are enabled, only kernels with a backward pass are returned. If `own` is False,
    this project's Hopper kernel is left out.
    """
    allowed = [kernel for kernel in _FASTEST_FIRST if own or kernel != "hopper"]
    return [kernel for kernel in allowed if _runs(kernel, tokens, head_size)]


def _runs(kernel: Kernel, tokens: Tensor, head_size: int) -> bool:
    """Return whether `kernel` supports the device and dtype of `tokens`."""
    if kernel == "sdpa":
        return True
    if not tokens.is_cuda or tokens.dtype not in (torch.float16, torch.bfloat16):
        return False
    if kernel == "flash":
        return _flash_runs_on(tokens.device)
    # Under autocast, norms return float32, so queries and keys differ in dtype from the tokens.
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
    """Check that the selected kernel can run; called before anything is loaded.

    Args:
        choice: "auto", which can always run, or the name of a kernel.
        model: the `model` section of the configuration.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: the kernel cannot run (the message says what it needs), or see `head_size`.
    """
    width = head_size(model)
    if choice == "auto" or _runs(choice, torch.empty(0, dtype=dtype, device=device), width):
        return
    raise UserError(
        f"attention: {choice} does not run here: it needs {_NEEDS[choice]}; leave attention out "
        "to use the fastest available kernel"
    )


# Per GPU: how many parts of the queries the Hopper kernel has computed, and how many of these parts
# its fallback has computed.
_tallies: dict[torch.device, Tensor] = {}


def restart_tally() -> None:
    """Reset the counts that `fallback_ratio` reads."""
    for tally in _tallies.values():
        tally.zero_()


def fallback_ratio() -> float:
    """Return which fraction of the Hopper kernel's work its fallback did; waits for the GPU."""
    counts = [tally.tolist() for tally in _tallies.values()]
    computed, by_fallback = map(sum, zip(*counts, strict=True)) if counts else (0, 0)
    return by_fallback / max(computed, 1)


@functools.lru_cache
def _flash_runs_on(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    return capability in (_HOPPER, _BLACKWELL) and flash_is_installed()


@functools.lru_cache
def _hopper_runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a trial run of the Hopper kernel works; Triton's API for it still changes."""
    if torch.cuda.get_device_capability(device) != _HOPPER or not can_compile_kernels():
        return False
    generator = torch.Generator().manual_seed(0)  # does not change the global generator
    query, key, value = torch.randn(3, 1, 300, 2, _HOPPER_HEAD_SIZE, generator=generator)
    query[..., 1, :] *= 1000  # so that the fallback computes most of the second head
    inputs = [tensor.to(device, dtype) for tensor in (query, key, value)]
    problem = None
    try:
        found, _ = hopper_attention(*inputs)
        expected = attend(*inputs, kernel="sdpa")
        # Each result may be off by one unit in the last place; values are up to 4.
        if not torch.allclose(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps):
            problem = "its results differ from PyTorch's"
    except torch.OutOfMemoryError:  # the kernel itself may work
        raise
    except Exception as error:  # Triton's compiler and the GPU driver can raise anything
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    restart_tally()  # remove the counts of this trial
    if problem:
        logger.warning("attention is slower, because the Hopper kernel does not work: %s", problem)
    else:
        logger.info("attention uses the Hopper kernel of this project")
    return problem is None


def flash_is_installed() -> bool:
    """Return whether FlashAttention-4 is installed; older releases have no `flash_attn.cute`."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # flash_attn itself is not installed
        return False


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, kernel: Kernel, shard: SequenceShard | None = None
) -> Tensor:
    """Return the attention without mask or dropout; all tensors are (b, n, heads, head_size).

    With a `shard`, the n tokens are those of this process; they attend to all processes' tokens.
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
    """Return the attention of k branches of guidance, which have the same video tokens.

    Each branch has its own text. The attention among video tokens is computed once, and is then
    joined with the attention to each text. The result has no gradient. PyTorch's kernel cannot be
    used, because it does not return the log-sum-exp.

    Args:
        text: query, key and value, (k * b, n_text, heads, head_size) each, branch after branch.
        video: query, key and value, (b, n_video, heads, head_size) each.
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
    # The texts of all branches form one sequence of queries, so the video tokens are not copied.
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
    """Return the attention to two sets of keys together, given the attention to each set.

    `first` and `second` are the result (…, n, heads, head_size) and the log-sum-exp of the scores
    (…, heads, n), which is the logarithm of the result's weight in the joined result.
    Source: Dao et al., "FlashAttention", section 3.1.
    """
    (result, log_sum_exp), (other, other_log_sum_exp) = first, second
    fraction = torch.sigmoid(other_log_sum_exp - log_sum_exp).transpose(-1, -2)[..., None]
    return torch.lerp(result, other, fraction.to(result.dtype))


@torch.library.custom_op("cogvideox::hopper_attention", mutates_args=())
def hopper_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Call this project's Hopper kernel; like `flash_attention`, but without a gradient."""
    from sgm.modules.transformer.hopper_attention import attend_on_hopper

    if query.device not in _tallies:
        _tallies[query.device] = torch.zeros(2, dtype=torch.int64, device=query.device)
    return attend_on_hopper(query, key, value, tally=_tallies[query.device])


@torch.library.custom_op("cogvideox::flash_attention", mutates_args=())
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Call FlashAttention-4, with inputs (b, n, heads, head_size).

    This is a custom operator because then `torch.compile` does not trace into it, and activation
    checkpointing can store its result. Source: Shah et al., "FlashAttention-3" (Hopper), and its
    successor for Blackwell.

    Returns:
        The result (b, n, heads, head_size), and the log-sum-exp (b, heads, n) in float32.
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
    """Return the gradients of `query`, `key` and `value`; `gradient` is that of the result."""
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

# Activation checkpointing can store the results of these operators. The last four belong to
# PyTorch's attention, which calls one of them.
ATTENTION_OPERATORS = [
    torch.ops.cogvideox.flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
