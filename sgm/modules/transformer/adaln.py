"""A transformer block whose norms are steered by the diffusion time, apart for text and video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from sat.model.base_model import BaseMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

QK_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one sub-layer for one kind of token, each (b, 1, d)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


@dataclass(frozen=True)
class JointModulation:
    """The modulation of one sub-layer; the first `text_length` tokens are text, the rest video."""

    text: Modulation
    video: Modulation
    text_length: int

    def modulate(self, normed: Tensor) -> Tensor:
        """The input of the sub-layer: ``normed * (1 + scale) + shift``, (b, n, d)."""
        text, video = normed[:, : self.text_length], normed[:, self.text_length :]
        return torch.cat(
            [
                modulate(text, self.text.shift, scale=self.text.scale),
                modulate(video, self.video.shift, scale=self.video.scale),
            ],
            dim=1,
        )

    def add_gated(self, tokens: Tensor, update: Tensor) -> Tensor:
        """The sub-layer's result: ``tokens + gate * update``, (b, n, d)."""
        text, video = tokens[:, : self.text_length], tokens[:, self.text_length :]
        text_update, video_update = update[:, : self.text_length], update[:, self.text_length :]
        return torch.cat(
            [
                torch.addcmul(text, self.text.gate, text_update),
                torch.addcmul(video, self.video.gate, video_update),
            ],
            dim=1,
        )


def modulate(normed: Tensor, shift: Tensor, *, scale: Tensor) -> Tensor:
    """``normed * (1 + scale) + shift``; normed (b, n, d), shift and scale (b, 1, d)."""
    return torch.addcmul(shift, normed, 1 + scale)


class AdaLNMixin(BaseMixin):
    """Expert adaptive LayerNorm around SAT's attention and MLP (CogVideoX, section 2.2).

    Both kinds of token share the weights of a block, norms included, and differ only in shift,
    scale and gate, which a Linear per layer makes of the time embedding. These Linears start at
    zero, so that a fresh block is the identity (adaLN-Zero; Peebles and Xie, "Scalable Diffusion
    Models with Transformers", section 3.2).

    Args:
        num_layers: blocks of the transformer.
        hidden_size: width d of a token.
        head_size: width of an attention head.
        time_embed_dim: width of the time embedding.
        qk_ln: normalise the queries and keys of each head.
        elementwise_affine: these norms have weight and bias.
        checkpoint_activations: keep only the input of each block for the backward pass and
            compute the rest again there.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        head_size: int,
        time_embed_dim: int,
        qk_ln: bool = True,
        elementwise_affine: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.qk_ln = qk_ln
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 12 * hidden_size))
            for _ in range(num_layers)
        )
        for modulation in self.adaLN_modulations:
            nn.init.zeros_(modulation[1].weight)
            nn.init.zeros_(modulation[1].bias)
        if qk_ln:
            head_norm = partial(
                nn.LayerNorm, head_size, eps=QK_NORM_EPSILON, elementwise_affine=elementwise_affine
            )
            self.query_layernorm_list = nn.ModuleList(head_norm() for _ in range(num_layers))
            self.key_layernorm_list = nn.ModuleList(head_norm() for _ in range(num_layers))

    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor,
        *,
        layer_id: Tensor | int,
        time_embedding: Tensor,
        text_length: int,
        **_: Any,
    ) -> Tensor:
        """Block `layer_id` on tokens (b, n, d) with time embedding (b, time_embed_dim).

        `mask` is what SAT hands on; attention here is full and does not read it.
        """
        # SAT gives the layer as a CPU tensor; int() of it waits for no GPU.
        block = partial(self._block, layer_id=int(layer_id), text_length=text_length, mask=mask)
        if self.checkpoint_activations and torch.is_grad_enabled():
            # SAT has a loop for this, but it is re-entrant (it needs an input with gradient) and
            # on a machine with a GPU it is DeepSpeed's, which recomputes outside autocast and
            # moves a CPU model's tensors to the GPU.
            return checkpoint(block, hidden_states, time_embedding, use_reentrant=False)
        return block(hidden_states, time_embedding)

    def _block(
        self,
        tokens: Tensor,
        time_embedding: Tensor,
        *,
        layer_id: int,
        text_length: int,
        mask: Tensor,
    ) -> Tensor:
        layer = self.transformer.layers[layer_id]
        for_attention, for_mlp = self._modulations(
            layer_id, time_embedding, text_length=text_length
        )

        attention_input = for_attention.modulate(layer.input_layernorm(tokens))
        attended = layer.attention(attention_input, mask, layer_id=layer_id)
        tokens = for_attention.add_gated(tokens, attended)

        mlp_input = for_mlp.modulate(layer.post_attention_layernorm(tokens))
        return for_mlp.add_gated(tokens, layer.mlp(mlp_input, layer_id=layer_id))

    def _modulations(
        self, layer_id: int, time_embedding: Tensor, *, text_length: int
    ) -> tuple[JointModulation, JointModulation]:
        """Modulations of a block's attention and of its MLP, from (b, time_embed_dim)."""
        video, text = rearrange(
            self.adaLN_modulations[layer_id](time_embedding),
            "b (kind sublayer part d) -> kind sublayer part b 1 d",
            kind=2,
            sublayer=2,
            part=3,
        )  # each (2, 3, b, 1, d)
        attention, mlp = (
            JointModulation(
                text=Modulation(*text[sublayer]),
                video=Modulation(*video[sublayer]),
                text_length=text_length,
            )
            for sublayer in range(2)
        )
        return attention, mlp

    def attention_fn(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, layer_id: int, **__: Any
    ) -> Tensor:
        """Full attention over text and video together, (b, heads, n, head_size) each.

        Neither the mask nor the dropout that SAT passes is read: looking into a mask would make
        the CPU wait for the GPU, and this model has neither.
        """
        if self.qk_ln:
            query = self.query_layernorm_list[layer_id](query)
            key = self.key_layernorm_list[layer_id](key)
        return F.scaled_dot_product_attention(query, key, value)
