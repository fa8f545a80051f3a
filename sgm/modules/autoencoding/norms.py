"""Norms of the autoencoder, and norm, modulation and SiLU fused into two passes over memory.

The fused form reads once and writes once. Statistics are merged from parts (Chan, Golub and
LeVeque 1979), so that nothing of a feature map's size is held beside input and output. Norm and
modulation together are a·x + b, and a and b vary only where the latents do, so that they are as
small as these.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.autoencoding.causal_conv import CausalConv3d
from sgm.modules.autoencoding.convolve import empty_frames, with_room
from sgm.modules.autoencoding.resize import stretch_time
from sgm.toolchain import can_compile_kernels

NUM_GROUPS = 32
EPSILON = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He 2018) with statistics over all frames that it is given.

    Raises:
        UserError: `channels` is not a multiple of the number of groups.
    """
    if channels % NUM_GROUPS:
        raise UserError(
            f"a level of the autoencoder has {channels} channels, but they must be a multiple of "
            f"{NUM_GROUPS}; change ch or ch_mult in encoder_config and decoder_config"
        )
    return nn.GroupNorm(NUM_GROUPS, channels, eps=EPSILON)


class LatentModulatedNorm(nn.Module):
    """GroupNorm whose scale and shift at each place are linear in the latents there.

    The decoder's norm: spatially conditional normalisation of MoVQ (Zheng et al. 2022, section 3.2)
    over video.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """GroupNorm(x) · conv_y(z) + conv_b(z), with z stretched to the size of `x`.

        Args:
            x: (b, c, t, h, w), sizes being multiples of those of `latents` (see `stretch_time`).
            latents: (b, z, t_z, h_z, w_z)

        Returns:
            (b, c, t, h, w), newly allocated.
        """
        num_frames = x.shape[2]
        rows, columns = x.shape[3] // latents.shape[3], x.shape[4] // latents.shape[4]
        # Convolutions of one pixel commute with repeating pixels. They run at the latents' size and
        # only broadcasting brings their result to the size of x, which may be 64 times as large.
        scale, shift = (
            rearrange(stretch_time(conv(latents), num_frames), "b c t h w -> b c t h 1 w 1")
            for conv in (self.conv_y, self.conv_b)
        )
        normed = rearrange(
            self.norm_layer(x), "b c t (h i) (w j) -> b c t h i w j", i=rows, j=columns
        )
        modulated = torch.addcmul(shift, normed, scale)
        return rearrange(modulated, "b c t h i w j -> b c t (h i) (w j)")


# Elements of a feature map that are treated at once without Triton. On a CPU they fit its cache.
CPU_PART, GPU_PART = 2**18, 2**26
_HALF_TYPES = (torch.float16, torch.bfloat16)


def norm_silu(
    norm: nn.Module,
    x: Tensor,
    latents: Tensor | None,
    *,
    room: int = 0,
    into: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """SiLU(norm(x + offset)), where norm takes the latents too if there are any (in the decoder).

    Args:
        norm: a `GroupNorm` or, with latents, a `LatentModulatedNorm`.
        x: (b, c, t, h, w).
        latents: (b, z, t_z, h_z, w_z), as `LatentModulatedNorm` takes them.
        room: frames of no meaning to leave in front.
        into: (b, c, t, h, w) that takes the result, which may be `x`; only without gradients.
        offset: (c,), the bias that the convolution before has left out, which costs nothing here;
            only where there are `fused_kernels`.

    Returns:
        `into`, or a new tensor (b, c, room + t, h, w). Half types are computed in float32.
    """
    if needs_grad(norm, x):
        normed = norm(x) if latents is None else norm(x, latents)
        return with_room(F.silu(normed, inplace=True), room)
    result = into
    if into is None:
        result = empty_frames(x, channels=x.shape[1], size=(room + x.shape[2], *x.shape[3:]))
        into = result[:, :, room:]
    layer, modulation = norm, None
    if isinstance(norm, LatentModulatedNorm):
        layer, modulation = norm.norm_layer, (norm.conv_y(latents), norm.conv_b(latents))
    fused = fused_kernels(x)
    if fused is not None:
        factors = fused.norm_factors(x, layer, offset=offset)
        fused.affine_silu(x, factors, modulation=modulation, into=into)
        return result
    mean, variance = _merge(*_moments(x), num_groups=layer.num_groups)
    scale = (variance + layer.eps).rsqrt() * layer.weight  # (b, c), float64
    shift = layer.bias - mean * scale
    scale, shift = (factor[:, :, None, None, None] for factor in (scale, shift))
    if modulation is not None:
        latent_scale, latent_shift = modulation
        # In float64 until here, since each rounding of a factor would be one of the result.
        scale, shift = scale * latent_scale, shift * latent_scale + latent_shift
    scale, shift = (factor.to(_working_dtype(x)) for factor in (scale, shift))
    _affine_silu(x, scale=scale, shift=shift, into=into)
    return result


def needs_grad(module: nn.Module, x: Tensor) -> bool:
    """Whether a result of `module` on `x` must be differentiable, so that `x` is to be kept."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(weight.requires_grad for weight in module.parameters())


def fused_kernels(x: Tensor) -> ModuleType | None:
    """The module of Triton kernels where they serve for `x`, else None.

    Convolutions then leave their bias to what follows, since cuDNN adds it in a pass of its own.
    """
    if not x.is_cuda or x.dtype not in _HALF_TYPES or not can_compile_kernels():
        return None
    from sgm.modules.autoencoding import triton_norm

    return triton_norm


def _working_dtype(x: Tensor) -> torch.dtype:
    """Float32, or float64 for `x` of that."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(x: Tensor) -> list[slice]:
    """Runs of frames of `x`, (b, c, t, h, w), with a bounded number of elements of a sample."""
    limit = GPU_PART if x.is_cuda else CPU_PART
    step = max(1, limit // x[0, :, 0].numel())
    return [slice(start, start + step) for start in range(0, x.shape[2], step)]


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (p,), means and sums of squared deviations (p, b, c) of each channel in p parts."""
    counts, means, squares = zip(
        *(_moments_of_part(x[:, :, part]) for part in _parts(x)), strict=True
    )
    return torch.tensor(counts, device=x.device), torch.stack(means), torch.stack(squares)


def _moments_of_part(x: Tensor) -> tuple[int, Tensor, Tensor]:
    means, squares = [], []
    for sample in x.split(1):  # one by one, so that sums have the same order in any batch
        values = sample.to(_working_dtype(x))
        mean = values.mean(dim=(2, 3, 4), keepdim=True)
        deviations = values - mean
        means.append(mean[:, :, 0, 0, 0])
        squares.append(deviations.mul_(deviations).sum(dim=(2, 3, 4)))
    return x[0, 0].numel(), torch.cat(means), torch.cat(squares)


def _merge(
    counts: Tensor, means: Tensor, squares: Tensor, *, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel's group, (b, c) each in float64, from those of parts.

    Args:
        counts: (p,), elements of a channel in each part.
        means: (p, b, c).
        squares: (p, b, c), sums of squared deviations from these means.
        num_groups: into which the channels are divided.
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
    mean = mean[0, :, :, 0]
    return tuple(part.repeat_interleave(per_group, dim=1) for part in (mean, variance))


def _affine_silu(x: Tensor, *, scale: Tensor, shift: Tensor, into: Tensor) -> None:
    """into = SiLU(scale · x + shift), with scale and shift, (b, c, t_z, h_z, w_z), stretched."""
    if scale.shape[2] > 1:
        scale, shift = (stretch_time(factor, x.shape[2]) for factor in (scale, shift))
    rows, columns = x.shape[3] // scale.shape[3], x.shape[4] // scale.shape[4]
    # (b, c, t, h_z, 1, w_z, 1): broadcasting repeats it over the places of a latent.
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
            del modulated  # before the next one is made
