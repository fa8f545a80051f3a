"""The engine: the transformer, autoencoder and text encoder of a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sgm.checkpoint.find import Weights, find_transformer
from sgm.checkpoint.lora import merge_updates, read_updates
from sgm.checkpoint.lora_formats import names_with_lora
from sgm.checkpoint.transformer import (
    check_transformer,
    fingerprint,
    is_lora_matrix,
    load_transformer,
    read_transformer,
)
from sgm.config import LoraChoice
from sgm.errors import UserError, nearest_name
from sgm.models.autoencoder import (
    build_first_stage,
    draw_latents,
    encode_moments,
    fit_rgb,
    load_first_stage,
)
from sgm.models.tiled_decoding import decode_tiled
from sgm.models.transformer import DiffusionTransformer
from sgm.modules.autoencoding.causal_conv import ConvCache, HostConvCache
from sgm.modules.diffusionmodules.sampling import SampledStep, Sampler
from sgm.offload import OffloadedWeights, move_to_host
from sgm.parallel.decoding import decode_together
from sgm.util import instantiate_from_config, instantiate_part, is_finite_number

Config = Mapping[str, Any]


class NetworkWrapper(nn.Module):
    """Calls the transformer in its own precision; inputs and outputs are float32.

    The attribute `diffusion_model` gives the weights the prefix ``model.diffusion_model.`` that
    they have in SAT checkpoints.

    Attributes:
        autocast_dtype: dtype of matrix products under `torch.autocast`; None uses that of the
            weights.
    """

    diffusion_model: DiffusionTransformer

    def __init__(self, diffusion_model: DiffusionTransformer) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.autocast_dtype: torch.dtype | None = None

    def forward(self, x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """x (b, t, c, h, w), timesteps (b,) in 0…999, cond of k b samples → (k b, t, c, h, w)."""
        dtype = self.diffusion_model.dtype
        is_autocast = self.autocast_dtype is not None
        with torch.autocast(x.device.type, self.autocast_dtype) if is_autocast else nullcontext():
            output = self.diffusion_model(
                x.to(dtype), timesteps=timesteps, context=cond["crossattn"].to(dtype)
            )
        return output.float()


class SATVideoDiffusionEngine(nn.Module):
    """The parts of a text-to-video model, and of its training loss.

    Args:
        network_config, denoiser_config, conditioner_config, first_stage_config, sampler_config,
            loss_fn_config: nodes of the parts of the model, each a `target` with its `params`.
        scale_factor: latents are multiplied by it after encoding and divided by it before decoding.
        not_trainable_prefixes: weights whose names begin with one of these are not trained;
            ``all`` trains the LoRA matrices only.
        lora_config: node of the LoRA mixin; older files have it in the network's `modules`.
        input_key: the entry of a batch that holds the video (or its latents).
        latent_input: batches hold unscaled latents, so the autoencoder is not built.
        cached_input: batches come from a cache (see sgm/data/cache.py), so neither the autoencoder
            nor the text encoder is kept.
        load: weights of the transformer, of SAT or diffusers; None starts from random ones.
        lora: LoRAs to merge into these weights; `lora_config` then has no effect.
        dtype, device: of all parts. On the device "meta" all parts are built without values, even
            those that are not kept, and compared with the headers of their files; `load_weights`
            then loads the values.
        tile_decode: decode in tiles, see sgm/models/tiled_decoding.py.

    Attributes:
        decoding_group: processes that decode each video together; the first of them gets it. None:
            this process decodes alone.

    Raises:
        UserError: a parameter or a file is invalid.
    """

    # Keys of older files without effect: there is no autocast to disable, and the trainer logs.
    IGNORED_PARAMS = frozenset({"disable_first_stage_autocast", "log_keys"})

    # A `VideoAutoencoderInferenceWrapper` or like one; None while no autoencoder is kept.
    first_stage_model: Any
    sampler: Sampler | None

    def __init__(
        self,
        *,
        network_config: Config,
        denoiser_config: Config,
        conditioner_config: Config,
        first_stage_config: Config,
        sampler_config: Config | None = None,
        loss_fn_config: Config | None = None,
        scale_factor: float = 1.0,
        not_trainable_prefixes: Sequence[str] | None = (),
        lora_config: Config | None = None,
        input_key: str = "mp4",
        latent_input: bool = False,
        cached_input: bool = False,
        load: str | Path | Weights | None = None,
        lora: Sequence[LoraChoice] = (),
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        tile_decode: bool = False,
    ) -> None:
        super().__init__()
        if not is_finite_number(scale_factor) or scale_factor <= 0:
            raise UserError(f"model.scale_factor: {scale_factor!r} must be a finite number above 0")
        self.scale_factor = scale_factor
        self.input_key = input_key
        self.latent_input = latent_input
        config = _network_config(network_config, lora_config, with_lora=not lora)
        self._network_config = config
        self._dtype = dtype
        self._weights = None if load is None else find_transformer(load)
        if self._weights is not None:  # for `base_weights`, which may be read from another folder
            self._weights_place = os.path.abspath(self._weights.path)
            self._weights_state = self._weights.state()
        self.base_fingerprint = ""  # of the weights before training and LoRAs; empty until then
        with torch.device("meta"):
            network = instantiate_from_config(config)
        self.model = NetworkWrapper(network)
        self._found = None if self._weights is None else check_transformer(network, self._weights)
        self._updates = read_updates(lora, dict(network.named_parameters()))
        self.not_trainable_prefixes = _checked_prefixes(
            not_trainable_prefixes, names_with_lora(network)
        )
        self.denoiser = instantiate_part(denoiser_config, "denoiser_config", needs=["__call__"])
        self.sampler = self.loss_fn = None
        if sampler_config:
            needs = ["steps", "num_steps"]
            self.sampler = instantiate_part(sampler_config, "sampler_config", needs=needs)
        if loss_fn_config:
            self.loss_fn = instantiate_part(loss_fn_config, "loss_fn_config", needs=["__call__"])
        self._first_stage_config = first_stage_config
        self.decoding_group: torch.distributed.ProcessGroup | None = None
        self.tile_decode = tile_decode
        self._make_cache: Callable[[], ConvCache] = ConvCache
        self.first_stage_model = None
        is_meta = torch.device(device).type == "meta"
        if cached_input:
            if is_meta:  # only to check it; its file stays mapped for the cache
                build_first_stage(first_stage_config, dtype=dtype, device="meta")
            # Cached moments need no other part of the autoencoder; this one has no weights.
            params = first_stage_config.get("params") or {}
            self.regularizer = instantiate_from_config(params.get("regularizer_config") or {})
        elif not latent_input:
            self.first_stage_model = build_first_stage(
                first_stage_config, dtype=dtype, device="meta"
            )
        self.conditioner = instantiate_part(
            conditioner_config,
            "conditioner_config",
            needs=["encode", "unconditional"],
            with_embedders=not cached_input,
            dtype=dtype,
            device=device if cached_input else "meta",
        )
        self._check_text_width()
        self._offloaded_from: torch.device | None = None
        resident: AbstractContextManager[None] = nullcontext()
        self._network_here = self._encoder_here = self._decoder_here = resident
        if not is_meta:
            self.load_weights(device)

    def load_weights(
        self,
        device: str | torch.device,
        *,
        text_device: str | torch.device | None = None,
        stream_text: bool = False,
    ) -> None:
        """Load the weights of all parts, which were built on the device "meta".

        Parts without a file get random weights. Call this once.

        Args:
            device: of all parts.
            text_device: of the text encoder; None: `device`.
            stream_text: keep the weights of the text encoder on its device only while they are
                used; see `offload` for the other parts.

        Raises:
            UserError: a file cannot be read.
            RuntimeError: the weights are loaded already.
        """
        if self.base_fingerprint:
            raise RuntimeError("the weights of this engine are loaded already")
        network, dtype = self.model.diffusion_model, self._dtype
        if self._found is None:
            network = instantiate_from_config(self._network_config).to(dtype=dtype, device=device)
            self.model.diffusion_model = network.train(self.training)
            self.base_fingerprint = fingerprint(network.state_dict())
        else:
            self.base_fingerprint = load_transformer(
                network, self._found, dtype=dtype, device=device
            )
            self._found = None
            self._weights.release()
        if self._updates:
            merge_updates(network, self._updates, base=self.base_fingerprint)
            for update in self._updates:
                if isinstance(update.path, Weights):  # the caller keeps it
                    update.path.release()
            self._updates = []
        if self.first_stage_model is not None:
            self.first_stage_model = load_first_stage(
                self.first_stage_model, self._first_stage_config, dtype=dtype, device=device
            )
            self.regularizer = self.first_stage_model.regularization
        self.conditioner.load_weights(
            device if text_device is None else text_device, streamed=stream_text
        )
        for name, weight in network.named_parameters():
            if not self._is_trained(name):
                weight.requires_grad_(False)

    @property
    def base_weights(self) -> Mapping[str, Tensor]:
        """The transformer's weights before any LoRA, mapped again from the file or folder `load`.

        Raises:
            UserError: the file changed after the weights were loaded.
        """
        weights = find_transformer(self._weights_place)
        if weights.state() != self._weights_state:
            raise UserError(
                f"{self._weights} changed after its weights were loaded; start again with it"
            )
        _, base, _ = read_transformer(weights)
        weights.release()
        return base

    def replace_loras(self, loras: Sequence[LoraChoice]) -> None:
        """Merge LoRAs into the weights, and remove those that were merged before.

        The result has the bytes of a fresh start with these LoRAs.

        Raises:
            UserError: a file is not a LoRA of this model, or the base weights can no longer be
                read; the weights are then unchanged.
        """
        network, base_weights = self.model.diffusion_model, self.base_weights
        merge_updates(
            network,
            read_updates(loras, dict(network.named_parameters())),
            base=self.base_fingerprint,
            base_weights=base_weights,
            device=self.device,
        )

    def _check_text_width(self) -> None:
        """Raise UserError if the text encoder's embeddings and the network differ in width."""
        given = getattr(self.conditioner, "text_width", None)
        wanted = getattr(self.model.diffusion_model, "text_width", None)
        if None not in (given, wanted) and given != wanted:
            raise UserError(
                f"conditioner_config: the text encoder gives embeddings of width {given}, but "
                f"text_hidden_size in patch_embed_config is {wanted}; name the encoder that "
                "belongs to this model"
            )

    def check_trained(self) -> None:
        """Raise UserError if no weight is trained; the engine may be on the device "meta"."""
        names = names_with_lora(self.model.diffusion_model)
        if not any(map(self._is_trained, names)) and not self.conditioner.is_trained:
            raise UserError("no weight is trained; check not_trainable_prefixes and lora_config")

    def _is_trained(self, name: str) -> bool:
        """Whether the transformer's weight of this name is trained."""
        if "all" in self.not_trainable_prefixes:
            return is_lora_matrix(name)
        return not name.startswith(self.not_trainable_prefixes)

    def train(self, mode: bool = True) -> SATVideoDiffusionEngine:
        """Switch to training mode; the autoencoder, which is never trained here, stays in eval."""
        super().train(mode)
        if self.first_stage_model is not None:
            self.first_stage_model.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The device on which the network computes; its weights may be offloaded to the CPU."""
        return self._offloaded_from or next(self.model.parameters()).device

    @contextmanager
    def loaded_first_stage(self) -> Iterator[None]:
        """Load the autoencoder for this context, if `cached_input` or `latent_input` left it out.

        Raises:
            UserError: its file is invalid.
        """
        if self.first_stage_model is not None:
            yield
            return
        self.first_stage_model = build_first_stage(
            self._first_stage_config, dtype=self._dtype, device=self.device
        )
        try:
            yield
        finally:
            self.first_stage_model = None

    def offload(self) -> None:
        """Keep the weights of network and decoder in the host's memory from now on, for inference.

        The network is on its device during `sample_steps`, the decoder during
        `decode_first_stage`. The decoder's convolutions keep the frames between chunks on the host
        too (in one process).
        """
        device, first_stage = self.device, self.first_stage_model
        self._offloaded_from = device
        for part in (self.model, first_stage.decoder):
            move_to_host(part)
        first_stage.encoder.to("cpu")  # sampling does not need it
        self._network_here = OffloadedWeights(self.model, device)
        self._encoder_here = OffloadedWeights(first_stage.encoder, device)
        self._decoder_here = OffloadedWeights(first_stage.decoder, device)
        self._make_cache = partial(HostConvCache, device)

    @torch.no_grad()
    def encode_first_stage(self, video: Tensor) -> Tensor:
        """Video (b, t, 3, h, w) in [-1, 1] → scaled latents (b, t', c, h/8, w/8), float32."""
        moments = encode_moments(self.first_stage_model, video)
        return draw_latents(self.first_stage_model.regularization, moments) * self.scale_factor

    def fit_rgb(self) -> Tensor:
        """As `sgm.models.autoencoder.fit_rgb`; an offloaded encoder is loaded for it."""
        with self._encoder_here:
            return fit_rgb(self.first_stage_model)

    @torch.no_grad()
    def decode_first_stage(self, latents: Tensor) -> Generator[Tensor, None, None]:
        """Scaled latents (b, t', c, h, w) → chunks (b, t, 3, 8h, 8w) of the video, in order.

        Values are about [-1, 1], float32. A chunk is yielded after the next one is launched, so
        that a GPU computes while frames are written.
        """
        z = rearrange(latents / self.scale_factor, "b t c h w -> b c t h w")
        first_stage, group = self.first_stage_model, self.decoding_group
        with self._decoder_here:
            z = z.to(next(first_stage.decoder.parameters()))
            if group is None:
                decode = partial(first_stage.decode_streamed, cache=self._make_cache())
            else:
                decode = partial(decode_together, first_stage, group=group)
            if self.tile_decode:
                decode = partial(decode_tiled, decode, factor=first_stage.encoder.space_factor)
            for chunk, _ in pairwise(chain(decode(z), [None])):
                yield rearrange(chunk.float(), "b c t h w -> b t c h w")

    @torch.no_grad()
    def sample_steps(
        self,
        cond: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor],
        shape: Sequence[int],
        *,
        generator: torch.Generator,
        sampler: Sampler | None = None,
    ) -> Generator[SampledStep, None, None]:
        """Sample scaled latents; each step is computed when it is requested.

        Args:
            cond, uncond: conditioning of both branches of guidance, on any device.
            shape: (b, t, c, h, w) of the latents.
            generator: source of all noise, on the CPU, so that a seed gives the same noise for
                every device.
            sampler: None: the one of the configuration.

        Yields:
            Each step; the last one's `x` is the result, float32.
        """
        sampler = sampler or self.sampler
        is_on_gpu = self.device.type == "cuda"

        def draw() -> Tensor:
            # The host does not wait for the copy if the memory is page-locked.
            noise = torch.randn(*shape, generator=generator, pin_memory=is_on_gpu)
            return noise.to(self.device, non_blocking=True)

        watched = self.model.diffusion_model.watched_attention()
        with self._network_here, watched as review_attention:
            for step in sampler.steps(
                self.model,
                self.denoiser,
                draw(),
                self._here(cond),
                self._here(uncond),
                noise=lambda step_index: draw(),
            ):
                if step.step_index == 0:
                    review_attention()
                yield step

    def _here(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditioning on the network's device; the text encoder may be on another."""
        return {key: embedding.to(self.device) for key, embedding in cond.items()}

    def get_input(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditioning of a training batch, the inputs of the loss.

        Args:
            batch: `input_key` (b, t, 3, h, w), a video in [-1, 1], or unscaled latents with
                `latent_input`; from a cache ``moments`` (b, t', 2c, h, w). Also the texts that the
                conditioner reads; from a cache ``crossattn`` (b, n_text, d_text).

        Returns:
            Scaled latents (b, t', c, h, w), float32, and conditioning, on the network's device.
            torch's global generators draw first the noise in the latents, then the samples whose
            text is dropped, in the same order for every kind of batch.
        """
        if "moments" in batch:
            moments = batch["moments"].to(self.device, non_blocking=True)
            latents = draw_latents(self.regularizer, moments) * self.scale_factor
        elif self.latent_input:
            latents = batch[self.input_key].to(self.device, non_blocking=True).float()
            latents = latents * self.scale_factor
        else:
            video = batch[self.input_key].to(self.device, non_blocking=True)
            latents = self.encode_first_stage(video)
        return latents, self._here(self.conditioner(batch))


def _checked_prefixes(value: Sequence[str] | None, names: Collection[str]) -> tuple[str, ...]:
    """`not_trainable_prefixes` as a tuple; null is empty.

    Args:
        value: of the configuration.
        names: of the transformer's weights, those of LoRA layers included.

    Raises:
        UserError: it is not a list of texts, or one of them matches no weight.
    """
    prefixes = () if value is None else value
    if not isinstance(prefixes, list | tuple) or not all(
        isinstance(p, str) and p for p in prefixes
    ):
        raise UserError(
            f"model.not_trainable_prefixes: {value!r} must be a list of texts, for example ['all']"
        )
    for prefix in prefixes:
        if prefix != "all" and not any(name.startswith(prefix) for name in names):
            known = {name.split(".")[0] + "." for name in names}
            raise UserError(
                f"not_trainable_prefixes: no weight's name begins with {prefix!r}; "
                f"{nearest_name(prefix, known)}"
            )
    return tuple(prefixes)


def _network_config(config: Config, lora_config: Config | None, *, with_lora: bool) -> Config:
    """The transformer's node with `lora_config` in its `modules`, or without it.

    Args:
        config: the node; it may have a `lora_config` of its own.
        lora_config: that of the section `model`.
        with_lora: False: leave both out.

    Raises:
        UserError: both are set and differ.
    """
    try:
        params = dict(config["params"])
        modules = dict(params["modules"])
    except (KeyError, TypeError, ValueError):  # building the transformer raises UserError for it
        return config
    own = modules.get("lora_config") or lora_config
    if lora_config and own != lora_config:
        raise UserError(
            "lora_config stands under model and under network_config.params.modules with "
            "different values; keep one"
        )
    params["modules"] = modules | {"lora_config": own if with_lora else None}
    return {**config, "params": params}
