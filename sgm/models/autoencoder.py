"""The 3D causal video autoencoder: loading, encoding, streamed decoding and previews."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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

# Latent frames in the first chunk of decoding, and in each later chunk. The norms compute their
# statistics over a chunk, so the released weights require these sizes.
FIRST_CHUNK_FRAMES, CHUNK_FRAMES = 3, 2

# For the fit of previews: height and width of the fitted frames, in latents, and the ridge
# coefficient relative to the mean square of the inputs.
_RGB_LATENTS, _RGB_RIDGE = 4, 1e-3


class VideoAutoencoderInferenceWrapper(nn.Module):
    """The video VAE of CogVideoX (Yang et al. 2024, section 2.1).

    Videos are (b, c, 4k+1, h, w) in [-1, 1], latents (b, z, k+1, h/8, w/8). Inputs may have any
    dtype: they are cast to the dtype of the weights. The results have the dtype of the weights.

    Args:
        encoder_config: configuration node of the encoder.
        decoder_config: configuration node of the decoder.
        regularizer_config: configuration node of the regularizer, which turns moments into latents.
        ckpt_path: path of the weights (see `find_autoencoder`); None keeps random weights, for
            training. If PyTorch's default device is "meta", the constructor only compares names
            and shapes with the model, and `load_weights` reads the values.
        ignore_keys: prefixes of names in the weight file; weights with these names are ignored.

    Raises:
        UserError: a configuration is invalid, or the file does not fit.
    """

    # cp_size is ignored because encoding is not split over processes. loss_config is ignored
    # because it is an Identity in the released configuration.
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
        # Weights that are read from a file need neither memory nor random values.
        with nullcontext() if ckpt_path is None else torch.device("meta"):
            self.encoder = instantiate_from_config(encoder_config)
            self.decoder = instantiate_from_config(decoder_config)
        self.regularization = instantiate_from_config(regularizer_config)
        self.weights = None if ckpt_path is None else find_autoencoder(ckpt_path)
        self._mapped: Mapping[str, Tensor] = {}
        if self.weights is not None:
            self._mapped = load_vae_state(self.weights, ignore_keys)
            hint = "check ckpt_path, or encoder_config and decoder_config, under first_stage_config"
            check_fit(on_meta(self._mapped), self.state_dict(), path=str(self.weights), hint=hint)
            if torch.get_default_device().type != "meta":
                self.load_weights()

    def encode(
        self, x: Tensor, unregularized: bool = False, *, noise: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return latents of a video, sampled from the distribution that the encoder predicts.

        Args:
            x: (b, c, 4k+1, 8h, 8w) in [-1, 1].
            unregularized: return ``(moments, {})`` instead, with moments (b, 2z, k+1, h, w).
            noise: (b, z, k+1, h, w), standard normal; None draws it from PyTorch's global
                generator.

        Returns:
            (b, z, k+1, h, w), not yet multiplied by the diffusion model's ``scale_factor``.

        Raises:
            ValueError: `x` has another shape.
        """
        channels = self.encoder.in_channels
        in_time, in_space = self.encoder.time_factor, self.encoder.space_factor
        is_video = x.ndim == 5 and x.shape[1] == channels and x.shape[2] % in_time == 1 % in_time
        if not is_video or x.shape[3] % in_space or x.shape[4] % in_space:
            raise ValueError(
                f"encode takes a video of shape (b, {channels}, {in_time}k+1, h, w) with h and w "
                f"divisible by {in_space}, not {tuple(x.shape)}"
            )
        dtype = _dtype_of(self.encoder)
        if needs_grad(self.encoder, x):
            moments = self.encoder(x.to(dtype))
        else:  # one at a time: this bounds the memory, and the batch size cannot change the bits
            moments = torch.cat([self.encoder(sample.to(dtype)) for sample in x.split(1)])
        if unregularized:
            return moments, {}
        return self.regularization(moments, noise=noise)

    def decode(self, z: Tensor) -> Tensor:
        """Return the video of latents, decoded in chunks (see `decode_streamed`).

        Args:
            z: (b, z, t, h, w) with an odd t, already divided by ``scale_factor``.

        Returns:
            (b, c, 4t - 3, 8h, 8w), about [-1, 1], not clamped.

        Raises:
            ValueError: `z` has another shape.
        """
        return torch.cat(list(self.decode_streamed(z)), dim=2)

    def decode_streamed(self, z: Tensor, *, cache: ConvCache | None = None) -> Iterator[Tensor]:
        """Decode chunk by chunk: first 3 latent frames, then 2 at a time.

        Between chunks, only the last two input frames of each convolution are kept, so the memory
        does not grow with the length of the video.

        Args:
            z: latents, as for `decode`.
            cache: an empty cache for these frames; None makes a new cache.

        Yields:
            (b, c, t, 8h, 8w): 9 frames (1, if there is only one latent frame), then 8 at a time.

        Raises:
            ValueError: `z` is not (b, z, t, h, w) with an odd t. The call itself raises this error,
                not the first iteration.
        """
        channels = self.decoder.z_channels
        if z.ndim != 5 or z.shape[1] != channels or z.shape[2] % 2 == 0:
            raise ValueError(
                f"decode takes latents of shape (b, {channels}, t, h, w) with an odd t, not "
                f"{tuple(z.shape)}: the first {FIRST_CHUNK_FRAMES} latent frames are decoded "
                f"together, then {CHUNK_FRAMES} at a time"
            )

        def decode_chunks(z: Tensor, cache: ConvCache) -> Iterator[Tensor]:
            with cache:
                for chunk in chunks_of(z):
                    yield self.decoder(chunk, cache=cache)

        return decode_chunks(z.to(_dtype_of(self.decoder)), ConvCache() if cache is None else cache)

    def load_weights(
        self, device: str | torch.device = "cpu", *, dtype: torch.dtype | None = None
    ) -> None:
        """Load the values of the weights from the file into the model. Call this only once.

        The constructor calls this itself, unless PyTorch's default device is "meta".

        Args:
            device: device of the weights.
            dtype: dtype of the weights; None means PyTorch's default.
        """
        default = torch.get_default_dtype()
        state = {
            name: tensor.to(default).to(device=device, dtype=dtype or default)
            for name, tensor in self._mapped.items()
        }
        self.load_state_dict(state, assign=True)
        self._mapped = {}
        self.weights.release()


def chunks_of(z: Tensor) -> list[Tensor]:
    """Split latents (b, z, t, h, w), with an odd t, into the chunks that are decoded."""
    first, rest = z[:, :, :FIRST_CHUNK_FRAMES], z[:, :, FIRST_CHUNK_FRAMES:]
    return [first, *(rest.split(CHUNK_FRAMES, dim=2) if rest.shape[2] else ())]


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def build_first_stage(
    config: Mapping[str, Any], *, dtype: torch.dtype, device: str | torch.device
) -> nn.Module:
    """Build the autoencoder of a configuration node, frozen and in evaluation mode.

    On the device "meta" it has no values until `load_first_stage` is called.

    Raises:
        UserError: the node or the weight file is invalid.
    """
    needs = ("encode", "decode_streamed", "regularization")
    is_meta = torch.device(device).type == "meta"
    # The result must not be a local variable: the first call imports modules that keep this frame
    # alive, and so would keep the autoencoder alive.
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
    """Load the weights of an autoencoder that `build_first_stage` built on the device "meta".

    The autoencoder is built again if it has no weight file, and so starts from random weights, or
    if it is not a `VideoAutoencoderInferenceWrapper`.

    Returns:
        The autoencoder to use: `first_stage`, or the one that was built again.
    """
    is_own = isinstance(first_stage, VideoAutoencoderInferenceWrapper)
    if not is_own or first_stage.weights is None:
        return build_first_stage(config, dtype=dtype, device=device)
    first_stage.load_weights(device, dtype=dtype)
    return first_stage


@torch.no_grad()
def encode_moments(first_stage: nn.Module, video: Tensor) -> Tensor:
    """Encode a video as moments, (b, t', 2c, h/8, w/8) in the dtype of the weights.

    The moments of a sample do not depend on the rest of the batch, bit for bit, so they can be
    cached.

    Args:
        first_stage: the autoencoder.
        video: (b, t, 3, h, w) in [-1, 1].
    """
    device = next(first_stage.parameters()).device
    pixels = rearrange(video.to(device), "b t c h w -> b c t h w")
    moments, _ = first_stage.encode(pixels, unregularized=True)
    return rearrange(moments, "b c t h w -> b t c h w")


def draw_latents(regularizer: nn.Module, moments: Tensor) -> Tensor:
    """Draw latents (b, t', c, h, w), float32, from moments (b, t', 2c, h, w).

    The latents are not yet scaled. The noise comes from PyTorch's global generator.
    """
    latents = regularizer(rearrange(moments, "b t c h w -> b c t h w"))
    return rearrange(latents.float(), "b c t h w -> b t c h w")


@torch.no_grad()
def fit_rgb(first_stage: VideoAutoencoderInferenceWrapper) -> Tensor:
    """Fit a linear map from latents to colours in [-1, 1], for previews.

    The map is a least-squares fit to encoded single frames, each filled with one colour. A small
    ridge term suppresses latent directions that do not occur in these frames.

    Returns:
        (c + 1, 3), float32, on the CPU; the last row is the constant term.
    """
    values = torch.tensor([-0.8, 0.8])
    colours = torch.cartesian_prod(values, values, values)  # (8, 3)
    side = _RGB_LATENTS * first_stage.encoder.space_factor
    frames = colours[:, None, :, None, None].expand(-1, 1, -1, side, side)  # (8, 1, 3, h, w)
    means, _ = encode_moments(first_stage, frames).float().cpu().chunk(2, dim=2)
    means = means.mean(dim=(1, 3, 4))  # (8, c)
    inputs = torch.cat([means, torch.ones(len(means), 1)], dim=1)  # (8, c + 1)
    gram = inputs.T @ inputs
    ridge = _RGB_RIDGE * gram.trace() / len(gram) * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, inputs.T @ colours)
