"""Norms of the autoencoder, and norm, modulation and SiLU fused into two passes over memory.

The first pass computes statistics, merged from parts (Chan, Golub and LeVeque 1979); the second one
writes the result. So no tensor of the size of a feature map is needed besides input and output.
Norm and modulation together are a·x + b, where a and b have the size of the latents.
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
    """Return a GroupNorm (Wu and He 2018) with statistics over all frames of its input.

    Raises:
        ValueError: `channels` is not a multiple of the number of groups.
    """
    return nn.GroupNorm(NUM_GROUPS, channels, eps=EPSILON)


class LatentModulatedNorm(nn.Module):
    """GroupNorm with scale and shift that are linear in the latents at the same place.

    It is the norm of the decoder: the spatially conditional normalisation of MoVQ (Zheng et al.
    2022, section 3.2), applied to video.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return GroupNorm(x) · conv_y(z) + conv_b(z), with z stretched to the size of `x`.

        Args:
            x: (b, c, t, h, w); its sizes are multiples of those of `latents` (see `stretch_time`).
            latents: (b, z, t_z, h_z, w_z).

        Returns:
            (b, c, t, h, w), newly allocated.
        """
        num_frames = x.shape[2]
        rows, columns = x.shape[3] // latents.shape[3], x.shape[4] // latents.shape[4]
        # Convolutions of one pixel commute with repeating pixels. They run at the size of the
        # latents, and broadcasting repeats their result: x may be 64 times as large.
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

# Elements of a feature map that are processed at once without Triton; a CPU's cache holds them.
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
    """Return SiLU(norm(x + offset)); with latents (in the decoder), norm takes them too.

    Args:
        norm: the norm; with latents a `LatentModulatedNorm`.
        x: (b, c, t, h, w).
        latents: (b, z, t_z, h_z, w_z), as `LatentModulatedNorm` takes them.
        room: frames with arbitrary values to leave before the result.
        into: (b, c, t, h, w) for the result; may be `x`. Only without gradients.
        offset: (c,), the bias that the previous convolution has left out, which costs no time
            here. Only with `fused_kernels`.

    Returns:
        `into`, or a new tensor (b, c, room + t, h, w). Half types are computed in float32.
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
        # In float64 until here, since each rounding of a factor would be one of the result.
        scale, shift = scale * latent_scale, shift * latent_scale + latent_shift
    dtype = _working_dtype(x)
    _affine_silu(x, scale=scale.to(dtype), shift=shift.to(dtype), into=into)
    return result


def needs_grad(module: nn.Module, x: Tensor) -> bool:
    """Whether `module(x)` must be differentiable, so that `x` must be kept unchanged."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(weight.requires_grad for weight in module.parameters())


def fused_kernels(x: Tensor) -> ModuleType | None:
    """Return the module of Triton kernels if they support `x`, else None.

    With these kernels, convolutions leave their bias to the next operation, because cuDNN would
    add it in a separate pass.
    """
    if not x.is_cuda or x.dtype not in _HALF_TYPES or not can_compile_kernels():
        return None
    from sgm.modules.autoencoding import triton_norm

    return triton_norm


def _working_dtype(x: Tensor) -> torch.dtype:
    """Return float32, or float64 for `x` of this type."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(x: Tensor) -> list[slice]:
    """Split the frames of `x`, (b, c, t, h, w), into parts with a bounded size per sample."""
    limit = GPU_PART if x.is_cuda else CPU_PART
    step = max(1, limit // x[0, :, 0].numel())
    return [slice(start, start + step) for start in range(0, x.shape[2], step)]


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts (p,), means and sums of squared deviations (p, b, c) per channel in p parts."""
    counts, means, squares = [], [], []
    for part in _parts(x):
        counts.append(x[0, 0, part].numel())
        # One sample at a time, so that sums have the same order in any batch.
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
    """Merge the moments of parts to mean and variance of each channel's group, (b, c), float64.

    Args:
        counts: (p,), elements of a channel in each part.
        means: (p, b, c).
        squares: (p, b, c), sums of squared deviations from these means.
        num_groups: number of groups of channels.
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
    """Write SiLU(scale · x + shift), scale and shift (b, c, t_z, h_z, w_z) stretched, to `into`."""
    if scale.shape[2] > 1:
        scale, shift = (stretch_time(factor, x.shape[2]) for factor in (scale, shift))
    rows, columns = x.shape[3] // scale.shape[3], x.shape[4] // scale.shape[4]
    # (b, c, t, h_z, 1, w_z, 1): broadcasting repeats them for all pixels of a latent.
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
            del modulated  # free it before the next one is computed
