"""Norms of the autoencoder, and a fusion of norm, modulation and SiLU into two passes over memory.

The first pass computes statistics of parts of a feature map and merges them (Chan, Golub and
LeVeque 1979). The second pass writes the result. Besides input and output, no tensor as large as a
feature map is needed: norm and modulation together are a·x + b, where a and b are only as large as
the latents.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_conv import CausalConv3d
from sgm.modules.autoencoding.convolve import empty_frames, with_room
from sgm.modules.autoencoding.resize import stretch_time
from sgm.toolchain import can_compile_kernels

NUM_GROUPS = 32
EPSILON = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm (Wu and He 2018); its statistics cover all frames of the input.

    Raises:
        ValueError: `channels` is not a multiple of the number of groups.
    """
    return nn.GroupNorm(NUM_GROUPS, channels, eps=EPSILON)


class LatentModulatedNorm(nn.Module):
    """A GroupNorm whose scale and shift are linear functions of the latent at the same position.

    The decoder uses this norm. It is the spatially conditional normalisation of MoVQ (Zheng et al.
    2022, section 3.2), applied to video.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return GroupNorm(x) · conv_y(z) + conv_b(z), with latents z resized to the size of `x`.

        Args:
            x: (b, c, t, h, w); h and w are multiples of h_z and w_z (for t see `stretch_time`).
            latents: z, (b, z, t_z, h_z, w_z).

        Returns:
            (b, c, t, h, w), newly allocated.
        """
        num_frames = x.shape[2]
        rows, columns = x.shape[3] // latents.shape[3], x.shape[4] // latents.shape[4]
        # A 1x1x1 convolution gives the same result before and after pixels are repeated. It runs
        # before, at the size of the latents, and broadcasting repeats its result up to 64 times.
        scale, shift = (
            rearrange(stretch_time(conv(latents), num_frames), "b c t h w -> b c t h 1 w 1")
            for conv in (self.conv_y, self.conv_b)
        )
        normed = rearrange(
            self.norm_layer(x), "b c t (h i) (w j) -> b c t h i w j", i=rows, j=columns
        )
        modulated = torch.addcmul(shift, normed, scale)
        return rearrange(modulated, "b c t h i w j -> b c t (h i) (w j)")


Norm = nn.GroupNorm | LatentModulatedNorm

# Without Triton, this many elements of a feature map are processed at a time. CPU_PART elements fit
# into a CPU's cache.
CPU_PART, GPU_PART = 2**18, 2**26
_HALF_TYPES = (torch.float16, torch.bfloat16)


def norm_silu(
    norm: Norm,
    x: Tensor,
    latents: Tensor | None,
    *,
    room: int = 0,
    into: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Return SiLU(norm(x + offset)), or with latents SiLU(norm(x + offset, latents)).

    Args:
        norm: a GroupNorm, or with latents (in the decoder) a `LatentModulatedNorm`.
        x: (b, c, t, h, w).
        latents: (b, z, t_z, h_z, w_z), see `LatentModulatedNorm`; None in the encoder.
        room: number of frames with arbitrary values to put before the result.
        into: (b, c, t, h, w), receives the result; it may be `x`. Only without gradients.
        offset: (c,), the bias of the previous convolution, if that has not added it; adding it here
            takes no extra time. Only with `fused_kernels`.

    Returns:
        `into`, or a new tensor (b, c, room + t, h, w). Half precision is computed in float32.
    """
    if needs_grad(norm, x):
        normed = norm(x) if latents is None else norm(x, latents)
        return with_room(F.silu(normed, inplace=True), room)
    result = into
    if result is None:
        result = empty_frames(x, channels=x.shape[1], size=(room + x.shape[2], *x.shape[3:]))
    into = result[:, :, room:]
    modulation = None
    if isinstance(norm, LatentModulatedNorm):
        modulation = norm.conv_y(latents), norm.conv_b(latents)
        norm = norm.norm_layer
    fused = fused_kernels(x)
    if fused is not None:
        factors = fused.norm_factors(x, norm, offset=offset)
        fused.affine_silu(x, factors, modulation=modulation, into=into)
        return result
    mean, variance = _merge(*_moments(x), num_groups=norm.num_groups)
    scale = (variance + norm.eps).rsqrt() * norm.weight  # (b, c), float64
    shift = norm.bias - mean * scale
    scale, shift = (factor[:, :, None, None, None] for factor in (scale, shift))
    if modulation is not None:
        latent_scale, latent_shift = modulation
        # The factors are float64 until here, because their rounding errors end up in the result.
        scale, shift = scale * latent_scale, shift * latent_scale + latent_shift
    dtype = _working_dtype(x)
    _affine_silu(x, scale=scale.to(dtype), shift=shift.to(dtype), into=into)
    return result


def needs_grad(module: nn.Module, x: Tensor) -> bool:
    """Return whether `module(x)` must be differentiable, so `x` must not be changed in place."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(weight.requires_grad for weight in module.parameters())


def fused_kernels(x: Tensor) -> ModuleType | None:
    """Return the module of Triton kernels if these support `x`, else None.

    With these kernels, the operation after a convolution adds the bias of the convolution, because
    cuDNN would add it in a separate pass.
    """
    if not x.is_cuda or x.dtype not in _HALF_TYPES or not can_compile_kernels():
        return None
    from sgm.modules.autoencoding import triton_norm

    return triton_norm


def _working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for computing on `x`: float64 if `x` is float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(x: Tensor) -> list[slice]:
    """Split the frames of `x` (b, c, t, h, w) into parts of bounded size per sample, as slices."""
    limit = GPU_PART if x.is_cuda else CPU_PART
    step = max(1, limit // x[0, :, 0].numel())
    return [slice(start, start + step) for start in range(0, x.shape[2], step)]


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments of each channel in p parts of the frames of `x` (b, c, t, h, w).

    Returns:
        The number of elements (p,), means (p, b, c), and sums of squared deviations (p, b, c).
    """
    counts, means, squares = [], [], []
    for part in _parts(x):
        counts.append(x[0, 0, part].numel())
        # One sample at a time, so the order of summation does not depend on the batch size.
        for sample in x[:, :, part].split(1):
            values = sample.to(_working_dtype(x))
            mean = values.mean(dim=(2, 3, 4), keepdim=True)
            deviations = values - mean
            means.append(mean.flatten())
            squares.append(deviations.mul_(deviations).sum(dim=(0, 2, 3, 4)))
    size = (len(counts), *x.shape[:2])
    counted = torch.tensor(counts, device=x.device)
    return counted, torch.stack(means).view(size), torch.stack(squares).view(size)


def _merge(
    counts: Tensor, means: Tensor, squares: Tensor, *, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Merge the moments of p parts; return mean and variance of each group of channels.

    Args:
        counts: (p,), number of elements per channel in each part.
        means: (p, b, c).
        squares: (p, b, c), sums of squared deviations from `means`.
        num_groups: number of groups of channels.

    Returns:
        Mean and variance, (b, c) each, float64; they are equal for all channels of a group.
    """
    counts = counts.double()[:, None, None, None]  # (p, 1, 1, 1)
    means, squares = (
        part.double().unflatten(2, (num_groups, -1)) for part in (means, squares)
    )  # (p, b, g, c / g)
    per_group = means.shape[-1]
    total = counts.sum() * per_group
    mean = (means * counts).sum(dim=(0, 3), keepdim=True) / total  # (1, b, g, 1)
    deviations = squares + counts * (means - mean).square()
    variance = deviations.sum(dim=(0, 3)) / total  # (b, g)
    mean = mean[0, :, :, 0].repeat_interleave(per_group, dim=1)
    return mean, variance.repeat_interleave(per_group, dim=1)


def _affine_silu(x: Tensor, *, scale: Tensor, shift: Tensor, into: Tensor) -> None:
    """Write SiLU(scale · x + shift) to `into`.

    Scale and shift, (b, c, t_z, h_z, w_z) each, are repeated to the size of `x` (b, c, t, h, w).
    """
    if scale.shape[2] > 1:
        scale, shift = (stretch_time(factor, x.shape[2]) for factor in (scale, shift))
    rows, columns = x.shape[3] // scale.shape[3], x.shape[4] // scale.shape[4]
    # (b, c, t, h_z, 1, w_z, 1): broadcasting repeats the values for all pixels of a latent.
    scale, shift = (factor[:, :, :, :, None, :, None] for factor in (scale, shift))
    for part in _parts(x):
        at = part if scale.shape[2] > 1 else slice(None)
        places, target = (
            whole[:, :, part].unflatten(4, (-1, columns)).unflatten(3, (-1, rows))
            for whole in (x, into)
        )  # (b, c, t, h_z, rows, w_z, columns)
        if x.dtype == scale.dtype:
            torch.addcmul(shift[:, :, at], places, scale[:, :, at], out=target)
            F.silu(target, inplace=True)
        else:
            modulated = places.to(scale).mul_(scale[:, :, at]).add_(shift[:, :, at])
            target.copy_(F.silu(modulated, inplace=True))
            del modulated  # free its memory before the next part is computed
