"""The 3D causal video autoencoder, whole: encode, streamed decode, and its use by diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from sgm.checkpoint.find import Weights, find_autoencoder
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.vae import load_vae_state
from sgm.modules.autoencoding.causal_conv import ConvCache
from sgm.modules.autoencoding.norms import needs_grad
from sgm.util import instantiate_from_config, instantiate_part

# Latent frames that are decoded at once: of the first chunk, and of each one after it. The released
# weights were sampled so, and since the norms' statistics are those of a chunk, it is part of them.
FIRST_CHUNK_FRAMES, CHUNK_FRAMES = 3, 2

# Of the frames that previews are fitted to: their side in latents, and the ridge as a fraction of
# the mean square.
_RGB_LATENTS, _RGB_RIDGE = 4, 1e-3


class Reconstruction(NamedTuple):
    """A video that went through the autoencoder, and the moments that it had on the way."""

    video: torch.Tensor  # (b, c, t, h, w)
    moments: torch.Tensor  # (b, 2z, t_z, h_z, w_z)


class VideoAutoencoderInferenceWrapper(nn.Module):
    """The video VAE of CogVideoX (Yang et al. 2024, section 2.1).

    Videos are (b, c, 4k+1, h, w) in [-1, 1], latents (b, z, k+1, h/8, w/8). Inputs may
    have any dtype: they are cast to that of the weights, in which results come back.

    Args:
        encoder_config: node of the encoder.
        decoder_config: node of the decoder.
        regularizer_config: node of what turns moments into latents.
        ckpt_path: of the weights, as in `find_autoencoder`; None leaves them random, for training.
            Where PyTorch's default device is "meta", they are compared with the model only, until
            `load_weights`.
        ignore_keys: beginnings of names in that file which are not for this model.

    Raises:
        UserError: a configuration or the file does not fit.
    """

    # cp_size: work is not split over processes. loss_config: the released one is an Identity.
    IGNORED_PARAMS = frozenset({"cp_size", "loss_config"})

    def __init__(
        self,
        encoder_config: Mapping[str, Any],
        decoder_config: Mapping[str, Any],
        *,
        regularizer_config: Mapping[str, Any],
        ckpt_path: str | Path | Weights | None = None,
        ignore_keys: Sequence[str] = (),
    ) -> None:
        super().__init__()
        # Weights that a file replaces need neither memory nor a random start.
        with nullcontext() if ckpt_path is None else torch.device("meta"):
            self.encoder = instantiate_from_config(encoder_config)
            self.decoder = instantiate_from_config(decoder_config)
        self.regularization = instantiate_from_config(regularizer_config)
        self.weights = None if ckpt_path is None else find_autoencoder(ckpt_path)
        self._mapped: Mapping[str, Tensor] = {}
        if self.weights is not None:
            self._mapped = self._fitting_weights(self.weights, ignore_keys)
            if torch.get_default_device().type != "meta":
                self.load_weights()

    def encode(
        self,
        x: torch.Tensor,
        unregularized: bool = False,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """Latents of a video, drawn from the distribution that the encoder gives.

        Args:
            x: (b, c, 4k+1, 8h, 8w) in [-1, 1].
            unregularized: return ``(moments, {})`` instead, moments (b, 2z, k+1, h, w).
            noise: (b, z, k+1, h, w), standard normal; drawn here where it is None.
            generator: to draw from.

        Returns:
            (b, z, k+1, h, w), not yet multiplied by the diffusion model's ``scale_factor``.

        Raises:
            ValueError: `x` has another shape.
        """
        self._check_video(x)
        dtype = _dtype_of(self.encoder)
        if needs_grad(self.encoder, x):
            moments = self.encoder(x.to(dtype))
        else:  # one by one: in bounded memory, and to the last bit the same in any batch
            moments = torch.cat([self.encoder(sample.to(dtype)) for sample in x.split(1)])
        if unregularized:
            return moments, {}
        return self.regularization(moments, noise=noise, generator=generator)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Video of latents, decoded in chunks (see `decode_streamed`).

        Args:
            z: (b, z, t, h, w) with an odd t, already divided by ``scale_factor``.

        Returns:
            (b, c, 4t - 3, 8h, 8w), about [-1, 1], not clamped.

        Raises:
            ValueError: `z` has another shape.
        """
        return torch.cat(list(self.decode_streamed(z)), dim=2)

    def decode_streamed(
        self, z: torch.Tensor, *, cache: ConvCache | None = None
    ) -> Iterator[torch.Tensor]:
        """The frames of `decode`, chunk by chunk: 3 latent frames, then 2 at a time.

        Between chunks only the last two input frames of each convolution are kept, so memory does
        not grow with the length of the video. They belong to this call alone, and are kept in an
        empty `cache` where one is given.

        Yields:
            (b, c, t, 8h, 8w): 9 frames (1, if there is but one latent frame), then 8 at a time.

        Raises:
            ValueError: `z` is not (b, z, t, h, w) with an odd t; raised by the call itself.
        """
        channels = self.decoder.z_channels
        if z.ndim != 5 or z.shape[1] != channels:
            raise ValueError(
                f"decode takes latents of shape (b, {channels}, t, h, w), not {tuple(z.shape)}"
            )
        if z.shape[2] % 2 == 0:
            raise ValueError(
                f"decode takes an odd number of latent frames, not {z.shape[2]}: the first "
                f"{FIRST_CHUNK_FRAMES} are decoded together, then {CHUNK_FRAMES} at a time"
            )
        cache = ConvCache() if cache is None else cache
        return self._decode_chunks(z.to(_dtype_of(self.decoder)), cache)

    def _decode_chunks(self, z: torch.Tensor, cache: ConvCache) -> Iterator[torch.Tensor]:
        with cache:
            for chunk in chunks_of(z):
                yield self.decoder(chunk, cache=cache)

    def forward(
        self,
        x: torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Encode and decode a video with 8k+1 frames; arguments and errors as in `encode`."""
        moments, _ = self.encode(x, unregularized=True)
        latents = self.regularization(moments, noise=noise, generator=generator)
        return Reconstruction(video=self.decode(latents), moments=moments)

    def _check_video(self, x: torch.Tensor) -> None:
        channels = self.encoder.in_channels
        in_time, in_space = self.encoder.time_factor, self.encoder.space_factor
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(
                f"encode takes a video of shape (b, {channels}, t, h, w), not {tuple(x.shape)}"
            )
        num_frames, height, width = x.shape[2:]
        if num_frames % in_time != 1 % in_time:
            raise ValueError(
                f"encode takes {in_time}k+1 frames (1, {in_time + 1}, {2 * in_time + 1}, …), "
                f"not {num_frames}"
            )
        if height % in_space or width % in_space:
            raise ValueError(
                f"encode takes a height and a width divisible by {in_space}, not {height}x{width}"
            )

    def _fitting_weights(
        self, weights: Weights, ignore_keys: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """The weights of a file, not read yet; UserError if they are not those of this model."""
        found = load_vae_state(weights, ignore_keys)
        hint = "check ckpt_path, or encoder_config and decoder_config, under first_stage_config"
        check_fit(on_meta(found), self.state_dict(), path=str(weights), hint=hint)
        return found

    def load_weights(
        self, device: str | torch.device = "cpu", *, dtype: torch.dtype | None = None
    ) -> None:
        """Put the weights in place; to be called once, after building on the device "meta".

        Args:
            device: of the weights.
            dtype: of the weights; None: PyTorch's default.
        """
        default = torch.get_default_dtype()
        state = {
            name: tensor.to(default).to(device=device, dtype=dtype or default)
            for name, tensor in self._mapped.items()
        }
        self.load_state_dict(state, assign=True)
        self._mapped = {}
        self.weights.release()


def chunks_of(z: torch.Tensor) -> list[torch.Tensor]:
    """Latents (b, z, t, h, w), t odd, in the parts that are decoded as one."""
    first, rest = z[:, :, :FIRST_CHUNK_FRAMES], z[:, :, FIRST_CHUNK_FRAMES:]
    return [first, *(rest.split(CHUNK_FRAMES, dim=2) if rest.shape[2] else ())]


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def build_first_stage(
    config: Mapping[str, Any], *, dtype: torch.dtype, device: str | torch.device
) -> nn.Module:
    """The autoencoder of a node, frozen and in evaluation mode.

    On the device "meta" it has no values until `load_first_stage`.

    Raises:
        UserError: the node or the file of weights is wrong.
    """
    needs = ("encode", "decode_streamed", "regularization")
    is_meta = torch.device(device).type == "meta"
    # No local name for it: the first call imports modules, some of which keep this frame alive.
    with torch.device("meta") if is_meta else nullcontext():
        return (
            instantiate_part(config, "first_stage_config", needs=needs)
            .to(device=device, dtype=dtype)
            .eval()
            .requires_grad_(False)
        )


def load_first_stage(
    first_stage: nn.Module,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> nn.Module:
    """The autoencoder, built by `build_first_stage` on the device "meta", with its weights.

    One without a file, which starts from random weights, and one of another class are built anew.
    """
    is_own = isinstance(first_stage, VideoAutoencoderInferenceWrapper)
    if not is_own or first_stage.weights is None:
        return build_first_stage(config, dtype=dtype, device=device)
    first_stage.load_weights(device, dtype=dtype)
    return first_stage


@torch.no_grad()
def encode_moments(first_stage: nn.Module, video: Tensor) -> Tensor:
    """Video (b, t, 3, h, w) in [-1, 1] → moments (b, t', 2c, h/8, w/8) in the weights' dtype.

    A sample's moments are the same to the last bit whatever else is in the batch, so that kept ones
    can stand for them.
    """
    device = next(first_stage.parameters()).device
    pixels = rearrange(video.to(device), "b t c h w -> b c t h w")
    moments, _ = first_stage.encode(pixels, unregularized=True)
    return rearrange(moments, "b c t h w -> b t c h w")


def draw_latents(regularizer: nn.Module, moments: Tensor) -> Tensor:
    """Moments (b, t', 2c, h, w) → latents (b, t', c, h, w), float32, not yet scaled.

    The noise comes from torch's global generator.
    """
    latents = regularizer(rearrange(moments, "b t c h w -> b c t h w"))
    return rearrange(latents.float(), "b c t h w -> b t c h w")


@torch.no_grad()
def fit_rgb(first_stage: nn.Module) -> Tensor:
    """Fit a linear map from latents to colours, for previews: (c + 1, 3), float32, on the CPU.

    Its last row is the constant; colours are in [-1, 1]. Least squares over single frames of one
    colour each; a small ridge keeps directions that no plain colour shows out of the map.
    """
    levels = torch.tensor([-0.8, 0.8])
    colours = torch.cartesian_prod(levels, levels, levels)  # (8, 3)
    side = _RGB_LATENTS * first_stage.encoder.space_factor
    frames = colours[:, None, :, None, None].expand(-1, 1, -1, side, side)  # (8, 1, 3, h, w)
    means, _ = encode_moments(first_stage, frames).float().cpu().chunk(2, dim=2)
    means = means.mean(dim=(1, 3, 4))  # (8, c)
    inputs = torch.cat([means, torch.ones(len(means), 1)], dim=1)  # (8, c + 1)
    gram = inputs.T @ inputs
    ridge = _RGB_RIDGE * gram.trace() / len(gram) * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, inputs.T @ colours)
