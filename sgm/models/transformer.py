"""The diffusion transformer of CogVideoX-2B, on SwissArmyTransformer's BaseModel.

Source of the architecture: Yang et al., "CogVideoX: Text-to-Video Diffusion Models with An Expert
Transformer", section 2.2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseModel
from sat.model.transformer import BaseTransformer
from torch import Tensor, distributed, nn

from sgm.distributed import SequenceShard
from sgm.errors import UserError
from sgm.modules.transformer.adaln import CheckpointingPolicy
from sgm.modules.transformer.attention import Kernel, fallback_ratio, restart_tally
from sgm.preflight import check_divides, check_modules, check_transformer_args
from sgm.sat_runtime import ensure_process_groups, quiet_sat
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)

LAYER_NORM_EPSILON = 1e-5  # of the norms that SAT creates: two per block, and a final one

# If the fallback of this project's Hopper kernel does more than this fraction of the work, the
# kernel is no longer used, because the fallback takes twice as long. FlashAttention-4 is faster
# from this ratio on, and PyTorch's attention from 0.2 on.
MAX_FALLBACK_RATIO = 0.1

# For each mixin: the sizes that its constructor takes in addition to the params of its node.
_SHARED_SIZES = ("hidden_size", "time_embed_dim", "elementwise_affine")
_SIZES_OF_PARTS = {
    "pos_embed": ("num_latent_frames", "grid_size", "hidden_size"),
    "patch_embed": ("in_channels", "hidden_size", "patch_size"),
    "adaln_layer": ("num_layers", "head_size", "checkpoint_activations", *_SHARED_SIZES),
    "final_layer": ("out_channels", "patch_size", *_SHARED_SIZES),
}


class DiffusionTransformer(BaseModel):
    """Predicts v for a noisy latent clip, given the timestep and a text embedding.

    The model is built on the default device, so ``with torch.device("meta")`` allocates nothing.
    A LoRA layer copies the weight that it wraps. This is not possible on the device "meta", so the
    code that loads the weights must call `add_lora` afterwards.

    Args:
        num_layers: number of blocks.
        hidden_size: width d of a token.
        num_attention_heads: attention heads per block; must divide d.
        in_channels: channels c of the noisy clip.
        out_channels: channels of the prediction.
        patch_size: height and width of a patch, in latent pixels.
        latent_height: height of a latent frame; determines the position table.
        latent_width: width of a latent frame; determines the position table.
        num_frames: frames of the longest video, 1 + a multiple of `time_compressed_rate`.
        time_compressed_rate: video frames per latent frame, after the first frame.
        time_embed_dim: width of the time embedding.
        modules: the nodes ``{pos_embed,patch_embed,adaln_layer,final_layer}_config`` and, for
            LoRA, ``lora_config``.
        transformer_args: settings of SAT's transformer. Only two have an effect:
            `checkpoint_activations` (recompute each block in the backward pass; see
            `set_checkpointing`) and `skip_init` (leave SAT's weights uninitialised).
        elementwise_affine: whether the layer norms have weight and bias.
        dtype: dtype of all weights.

    Raises:
        UserError: sizes do not match each other, or a key is unknown.
    """

    IGNORED_PARAMS = frozenset({"adm_in_channels"})

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        num_attention_heads: int,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        latent_height: int,
        latent_width: int,
        num_frames: int,
        time_compressed_rate: int,
        time_embed_dim: int,
        modules: Mapping[str, Any],
        transformer_args: Mapping[str, Any] | None = None,
        elementwise_affine: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        transformer_args = transformer_args or {}
        check_transformer_args(transformer_args)
        check_modules(modules, parts=_SIZES_OF_PARTS, num_layers=num_layers)
        check_divides("num_attention_heads", num_attention_heads, hidden_size=hidden_size)
        check_divides("patch_size", patch_size, latent_height=latent_height)
        check_divides("patch_size", patch_size, latent_width=latent_width)
        super().__init__(
            args=None,
            transformer=_build_sat_transformer(
                elementwise_affine=elementwise_affine,
                num_layers=num_layers,
                hidden_size=hidden_size,
                num_attention_heads=num_attention_heads,
                skip_init=transformer_args.get("skip_init", False),
                params_dtype=dtype,
            ),
        )
        self.hidden_size = hidden_size
        self.num_heads = num_attention_heads
        self.frame_shape = (in_channels, latent_height, latent_width)
        self.grid_size = (latent_height // patch_size, latent_width // patch_size)
        self.num_latent_frames = _latent_frames(num_frames, time_compressed_rate)
        self.lora_config = modules.get("lora_config")
        self.merged_layers: frozenset[str] = frozenset()  # layers into which LoRAs are merged
        self._sequence_group: distributed.ProcessGroup | None = None
        self.time_embed = nn.Sequential(
            nn.Linear(hidden_size, time_embed_dim),
            nn.SiLU(),
            nn.Linear(time_embed_dim, time_embed_dim),
        )
        self._add_parts(
            modules,
            num_layers=num_layers,
            num_latent_frames=self.num_latent_frames,
            grid_size=self.grid_size,
            hidden_size=hidden_size,
            head_size=hidden_size // num_attention_heads,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            time_embed_dim=time_embed_dim,
            elementwise_affine=elementwise_affine,
            checkpoint_activations=transformer_args.get("checkpoint_activations", False),
        )
        self.to(dtype)
        if not next(self.parameters()).is_meta:
            self.add_lora()

    def _add_parts(self, modules: Mapping[str, Any], **sizes: object) -> None:
        """Build each mixin from the params of its node and the entries of `sizes` that it needs."""
        for part, names in _SIZES_OF_PARTS.items():
            own_sizes = {name: sizes[name] for name in names}
            self.add_mixin(part, instantiate_from_config(modules[f"{part}_config"], **own_sizes))
        if self.lora_config:
            with quiet_sat():
                lora = instantiate_from_config(self.lora_config, layer_num=sizes["num_layers"])
            self.add_mixin("lora", lora)

    @property
    def text_width(self) -> int:
        """The width d_text of the text embeddings that the network expects."""
        return self.mixins["patch_embed"].text_proj.in_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.time_embed.parameters()).dtype

    @property
    def checkpointing(self) -> CheckpointingPolicy | None:
        """The activation checkpointing policy; None stores all activations. See the setter."""
        return self.mixins["adaln_layer"].checkpointing_policy

    def set_checkpointing(self, policy: CheckpointingPolicy | None) -> None:
        """Set which activations of each block are stored for the backward pass.

        "block" stores only the input of the block; None stores all activations. The other value of
        `CheckpointingPolicy` also stores the output of the attention.
        """
        self.mixins["adaln_layer"].checkpointing_policy = policy

    def set_attention(self, kernel: Kernel | Literal["auto"]) -> None:
        """Set the attention kernel; "auto" (the default) selects the fastest kernel."""
        self.mixins["adaln_layer"].attention = kernel

    @contextmanager
    def watched_attention(self) -> Iterator[Callable[[], None]]:
        """Allow disabling the Hopper kernel within this context, which covers one video.

        The kernel is disabled if its slower fallback does too much of the work. This happens if
        attention scores are widely spread.

        Yields:
            A function that disables the kernel if the fallback ratio exceeds `MAX_FALLBACK_RATIO`.
            Call it after the first step, so that the choice depends only on the video. It waits
            for the GPU. It has no effect if `set_attention` has set a kernel.
        """
        restart_tally()
        try:
            yield self._review_attention
        finally:
            self.mixins["adaln_layer"].allow_hopper = True

    def _review_attention(self) -> None:
        adaln = self.mixins["adaln_layer"]
        if adaln.attention != "auto":
            return
        ratio = fallback_ratio()
        if ratio > MAX_FALLBACK_RATIO:
            adaln.allow_hopper = False
            logger.info(
                "attention uses FlashAttention-4 or PyTorch from now on, because the fallback of "
                "the Hopper kernel did %.0f%% of the work in the first step",
                100 * ratio,
            )

    def split_sequence(self, group: distributed.ProcessGroup) -> None:
        """Split the tokens among the processes of `group`, for inference.

        All processes must call `forward` with the same inputs; each process gets the whole result.
        """
        self._sequence_group = group

    def compile_blocks(self, *, tune: bool = False) -> None:
        """Compile the blocks at the first forward pass.

        On a GPU, the first step then takes some seconds longer, or up to a minute with `tune`.

        Args:
            tune: benchmark several variants of each kernel, which is useful in training. It has no
                effect if norms are trained, because PyTorch would tune each of their kernels for
                every possible split of the sum over tokens, which takes many minutes.
        """
        modules = self.transformer.layers.modules()
        norms = (module for module in modules if isinstance(module, nn.LayerNorm))
        trained = any(weight.requires_grad for norm in norms for weight in norm.parameters())
        self.mixins["adaln_layer"].compile_blocks(tune=tune and not trained)

    def add_lora(self) -> None:
        """Wrap the weights in LoRA layers; the wrapped weights are the frozen base.

        This does nothing without a ``lora_config``, or if the LoRA layers exist already.

        Raises:
            RuntimeError: the weights are still on the device "meta"; load them first.
        """
        wrapped = any(".matrix_A." in name for name, _ in self.named_parameters())
        if not self.lora_config or wrapped:
            return
        if any(parameter.is_meta for parameter in self.transformer.parameters()):
            raise RuntimeError(
                "add_lora: the transformer's weights have no values; load them first"
            )
        with quiet_sat():
            self.mixins["lora"].reinit(self)

    def forward(
        self, x: Tensor, timesteps: Tensor, *, context: Tensor, **hook_arguments: object
    ) -> Tensor:
        """Return the prediction (k * b, t, c_out, h, w) for noisy clips, in the dtype of `x`.

        Args:
            x: noisy latents (b, t, c, h, w). h and w must match the position table, and t must not
                exceed its number of frames. A single frame is an image.
            timesteps: indices of the noise levels, (b,), 0 to 999; 999 is the noisiest.
            context: text embeddings (k * b, n_text, d_text) of k guidance branches, concatenated
                branch by branch; k is 1 without guidance.
            hook_arguments: passed to the hooks of the embeddings, the blocks and the head. They are
                for further mixins that are added to the model.

        Raises:
            UserError: a shape does not match the model.
        """
        self._check_shapes(x, timesteps=timesteps, context=context)
        time_embedding = self.time_embed(
            sinusoidal_embedding(timesteps, self.hidden_size).to(self.dtype)
        )
        num_branches = len(context) // len(x)
        time_embedding = time_embedding.repeat(num_branches, 1)  # (k * b, time_embed_dim)
        grid = (x.shape[1], *self.grid_size)
        shard: SequenceShard | None = None
        if self._sequence_group is not None:
            num_tokens = context.shape[1] + math.prod(grid)
            shard = SequenceShard.of(
                self._sequence_group, num_tokens=num_tokens, num_heads=self.num_heads
            )
        # SAT's transformer calls the hooks of the mixins in this order: patch_embed makes the
        # tokens (text first), pos_embed returns their position embeddings, adaln_layer runs each
        # block, and final_layer, after SAT's final norm, turns the video tokens into frames.
        prediction, *_ = super().forward(
            x.to(self.dtype),
            position_ids=None,
            attention_mask=None,
            context=context.to(self.dtype),
            time_embedding=time_embedding,
            text_length=context.shape[1],
            grid=grid,
            num_branches=num_branches,
            shard=shard,
            **hook_arguments,
        )
        return prediction.to(x.dtype)

    def _check_shapes(self, x: Tensor, *, timesteps: Tensor, context: Tensor) -> None:
        """Check the shapes of the inputs of `forward`.

        Raises:
            UserError: the shapes do not match the model or each other.
        """
        limit, text_length = self.num_latent_frames, self.mixins["pos_embed"].text_length
        fits = (
            x.ndim == 5
            and x.shape[2:] == self.frame_shape
            and min(len(x), len(context)) > 0
            and 1 <= x.shape[1] <= limit
            and timesteps.shape == x.shape[:1]
            and context.shape[1:] == (text_length, self.text_width)
            and len(context) % len(x) == 0
        )
        if not fits:
            raise UserError(
                f"latents of shape {tuple(x.shape)}, timesteps of shape {tuple(timesteps.shape)} "
                f"and text embedding of shape {tuple(context.shape)} do not match this model, "
                f"which takes (b, t, {', '.join(map(str, self.frame_shape))}) with t from 1 to "
                f"{limit}, (b,) and (k * b, {text_length}, {self.text_width}) for k branches of "
                "guidance; compare the sampling size with the model's latent_height, latent_width "
                "and num_frames, and the text encoder with its text_length and text_hidden_size"
            )


def sinusoidal_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding of `timesteps`: (b,) -> (b, width), float32.

    It is [cos | sin] of ``timestep * exp(-ln 10000 * i / (width / 2))``. Cosines come first, as
    the released weights expect. float32 is needed because half precision cannot distinguish
    neighbouring timesteps. Source: Vaswani et al., "Attention Is All You Need", section 3.5.
    """
    half = width // 2
    indices = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000) * indices / half)
    angles = timesteps.float()[:, None] * frequencies  # (b, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _build_sat_transformer(*, elementwise_affine: bool, **settings: object) -> BaseTransformer:
    """Build SAT's layers on the default device, without SAT's word and position embeddings.

    Args:
        elementwise_affine: whether the layer norms have weight and bias.
        settings: further arguments of `BaseTransformer`: its sizes and the dtype of its weights.
    """
    ensure_process_groups()
    transformer = BaseTransformer(
        vocab_size=1,
        max_sequence_length=1,
        layernorm_epsilon=LAYER_NORM_EPSILON,
        layernorm=partial(nn.LayerNorm, elementwise_affine=elementwise_affine),
        activation_func=partial(F.gelu, approximate="tanh"),
        device=torch.get_default_device(),
        **settings,
    )
    del transformer.word_embeddings, transformer.position_embeddings
    return transformer


def _latent_frames(num_frames: int, time_compressed_rate: int) -> int:
    """Return the number of latent frames of a video.

    The first video frame has its own latent frame; after that, each latent frame stands for
    `time_compressed_rate` video frames.

    Raises:
        UserError: `num_frames` is not 1 + a multiple of `time_compressed_rate`.
    """
    if num_frames < 1 or time_compressed_rate < 1 or (num_frames - 1) % time_compressed_rate:
        raise UserError(
            f"num_frames={num_frames}: it must be 1 + a multiple of "
            f"time_compressed_rate={time_compressed_rate}"
        )
    return (num_frames - 1) // time_compressed_rate + 1
