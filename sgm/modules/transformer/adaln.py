"""The transformer block: adaptive norms that modulate text and video tokens separately."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from sat.model.base_model import BaseMixin
from sat.model.transformer import BaseTransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sgm.distributed import SequenceShard
from sgm.modules.transformer.attention import (
    ATTENTION_OPERATORS,
    Kernel,
    attend,
    attend_branches,
    list_kernels,
)
from sgm.modules.transformer.linear import activated, project

# What a block stores for the backward pass. "block": only its input. "attention": its input and the
# output of its attention, which takes twice the memory. The attention is the most expensive part to
# recompute, because its work grows with the square of the number of tokens.
CheckpointingPolicy = Literal["block", "attention"]


def run_checkpointed(
    block: Callable[..., Tensor], *inputs: Tensor, policy: CheckpointingPolicy
) -> Tensor:
    """Return ``block(*inputs)``; the backward pass recomputes what the policy does not store.

    Dropout draws the same mask again. SAT's own checkpointing is not used, because it is re-entrant
    (it needs an input that requires a gradient). Also, if DeepSpeed is imported first, SAT uses
    DeepSpeed's checkpointing, which recomputes outside autocast and moves the tensors of a CPU
    model to the GPU.
    """
    if policy == "attention":
        contexts = partial(create_selective_checkpoint_contexts, ATTENTION_OPERATORS)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    return checkpoint(block, *inputs, use_reentrant=False)


QK_NORM_EPSILON = 1e-6


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer for text or video tokens; (b, 1, d) or (b, n, d)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def modulate(self, normed: Tensor) -> Tensor:
        """Return the sub-layer's input for the normed tokens (m, n, d) of the first m samples.

        m is less than b if the video tokens of the other samples are equal to these tokens.
        """
        num_samples = len(normed)
        return modulate(normed, self.shift[:num_samples], scale=self.scale[:num_samples])

    def add_gated(self, tokens: Tensor, update: Tensor) -> Tensor:
        """Return the tokens after the sub-layer, ``tokens + gate * update``, (b, n, d)."""
        return torch.addcmul(tokens, self.gate, update)


@dataclass(frozen=True)
class JointModulation:
    """The modulation of one sub-layer; the first `text_length` tokens are text, the rest video.

    In eager mode it is fastest to modulate text and video tokens separately. In compiled code, each
    token selects its own shift, scale and gate, so the compiler can fuse modulation and norm into
    one kernel.
    """

    text: Modulation
    video: Modulation
    text_length: int

    def modulate(self, normed: Tensor) -> Tensor:
        """Return the input of the sub-layer, ``normed * (1 + scale) + shift``, (b, n, d)."""
        if torch.compiler.is_compiling():
            return self._of_tokens(normed).modulate(normed)
        text, video = self._split(normed)
        return torch.cat([self.text.modulate(text), self.video.modulate(video)], dim=1)

    def add_gated(self, tokens: Tensor, update: Tensor) -> Tensor:
        """Return the tokens after the sub-layer, ``tokens + gate * update``, (b, n, d)."""
        if torch.compiler.is_compiling():
            return self._of_tokens(tokens).add_gated(tokens, update)
        (text, video), (of_text, of_video) = self._split(tokens), self._split(update)
        parts = [self.text.add_gated(text, of_text), self.video.add_gated(video, of_video)]
        return torch.cat(parts, dim=1)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[:, : self.text_length], tokens[:, self.text_length :]

    def _of_tokens(self, tokens: Tensor) -> Modulation:
        """Return the shift, scale and gate of each token, (b, n, d)."""
        is_text = (torch.arange(tokens.shape[1], device=tokens.device) < self.text_length)[:, None]
        pairs = zip(self.text, self.video, strict=True)
        return Modulation(*(torch.where(is_text, text, video) for text, video in pairs))


def modulate(normed: Tensor, shift: Tensor, *, scale: Tensor) -> Tensor:
    """Return ``normed * (1 + scale) + shift``, (b, n, d); shift and scale are broadcast."""
    return torch.addcmul(shift, normed, 1 + scale)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a Linear whose weight and bias are zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class AdaLNMixin(BaseMixin):
    """Expert adaptive LayerNorm around SAT's attention and MLP (CogVideoX, section 2.2).

    Text and video tokens share all weights of a block, also those of the norms. Only shift, scale
    and gate differ; one Linear per layer computes them from the time embedding. These Linears start
    at zero, so a new block is the identity (adaLN-Zero; Peebles and Xie, "Scalable Diffusion Models
    with Transformers", section 3.2).

    A block calls the Linears of SAT's layer, or the LoRA layers that replace them. It calls none of
    the hooks that SAT has within a layer, because these would split the compiled graph.

    Args:
        num_layers: number of blocks.
        hidden_size: width d of a token.
        head_size: width of an attention head.
        time_embed_dim: width of the time embedding.
        qk_ln: normalise the queries and keys of each head.
        elementwise_affine: whether the norms of queries and keys have weight and bias.
        checkpoint_activations: store only the input of each block; the backward pass recomputes
            everything else.

    Attributes:
        checkpointing_policy: what a block stores for the backward pass; None stores everything.
        attention: the attention kernel; "auto" selects the fastest available one.
        allow_hopper: whether "auto" may select this project's Hopper kernel. Becomes False when the
            kernel's fallback ratio is too high.
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
        self.checkpointing_policy: CheckpointingPolicy | None = (
            "block" if checkpoint_activations else None
        )
        self.attention: Kernel | Literal["auto"] = "auto"
        self.allow_hopper = True
        self.head_size = head_size
        self._run_block = run_block
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), zero_linear(time_embed_dim, 12 * hidden_size))
            for _ in range(num_layers)
        )
        head_norm: Callable[[], nn.Module] = nn.Identity
        if qk_ln:
            head_norm = partial(
                nn.LayerNorm, head_size, eps=QK_NORM_EPSILON, elementwise_affine=elementwise_affine
            )
        self.query_layernorm_list = nn.ModuleList(head_norm() for _ in range(num_layers))
        self.key_layernorm_list = nn.ModuleList(head_norm() for _ in range(num_layers))

    def compile_blocks(self, *, tune: bool) -> None:
        """Compile the block when it is first called; all layers use the same compiled code.

        With `tune`, compiling also searches for better kernel settings. This takes half a minute
        and makes a training step 1% faster; sampling gains nothing from it. There is a separate
        compilation for each shape of the tokens, for evaluation and for training, and for the first
        layer if branches of guidance share its video tokens. PyTorch allows 8 compilations; further
        variants run in eager mode.
        """
        options: dict[str, str | int | bool | Callable[..., object]] = {
            "coordinate_descent_tuning": tune,
            # By default, PyTorch stores a value in float32 if it is used twice and computed from
            # more than 4 tensors. In the backward pass of a norm, it is cheaper to recompute the
            # value from the tokens in half precision. No norm here reads 12 tensors.
            "realize_reads_threshold": 12,
        }
        self._run_block = torch.compile(run_block, dynamic=False, options=options)

    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor,
        *,
        layer_id: Tensor | int,
        time_embedding: Tensor,
        text_length: int,
        num_branches: int = 1,
        shard: SequenceShard | None = None,
        **_: object,
    ) -> Tensor:
        """Run block `layer_id` on tokens (b, n, d) with time embedding (b, time_embed_dim).

        The batch holds `num_branches` branches of guidance for the same clips; the first block
        computes only once what all branches share. With a `shard`, `hidden_states` holds only the
        tokens of this process. `mask` comes from SAT and is ignored, because the attention is full.
        """
        # SAT passes the layer as a CPU tensor, so int() does not wait for the GPU.
        layer = int(layer_id)
        tokens = hidden_states
        kernel = self.attention
        if kernel == "auto":
            kernel = list_kernels(tokens, head_size=self.head_size, own=self.allow_hopper)[0]
        # Before the first block, the video tokens do not depend on the text, so they are equal in
        # all branches. This is not used with gradients: the log-sum-exp, by which the two parts of
        # the attention are joined, has no gradient, and training has only one branch anyway.
        has_gradient = torch.is_grad_enabled()
        is_video_shared = layer == 0 and kernel != "sdpa" and shard is None and not has_gradient
        if self._run_block is not run_block and has_gradient:
            # With LoRA, the input of the first layer requires no gradient. Computing an unused
            # gradient costs less than compiling a second graph for this layer.
            tokens = tokens if tokens.requires_grad else tokens.detach().requires_grad_()
        block = Block(
            self.transformer.layers[layer],
            self.adaLN_modulations[layer],
            self.query_layernorm_list[layer],
            self.key_layernorm_list[layer],
            text_length=text_length if shard is None else shard.own_text_length(text_length),
            head_size=self.head_size,
            kernel=kernel,
            num_branches=num_branches if is_video_shared else 1,
            shard=shard,
        )
        policy = self.checkpointing_policy if has_gradient else None
        return self._run_block(tokens, time_embedding, block, policy=policy)


class Block(NamedTuple):
    """The modules and settings of one block.

    Attributes:
        layer: SAT's norms, attention and MLP.
        modulation: computes shift, scale and gate from the time embedding.
        query_norm: the norm of a head's queries.
        key_norm: the norm of a head's keys.
        text_length: number of text tokens, which precede the video tokens.
        head_size: width of an attention head.
        kernel: the attention kernel.
        num_branches: number of branches of guidance that share the attention among video tokens.
            If it is more than 1, the video tokens of all branches must be equal.
        shard: this process's part of the sequence; None if it has all tokens.
    """

    layer: BaseTransformerLayer
    modulation: nn.Module
    query_norm: nn.Module
    key_norm: nn.Module
    text_length: int
    head_size: int
    kernel: Kernel
    num_branches: int
    shard: SequenceShard | None

    def run(self, tokens: Tensor, time_embedding: Tensor) -> Tensor:
        """Return the tokens (b, n, d) after this block; time_embedding (b, time_embed_dim)."""
        layer, kernel, text_length = self.layer, self.kernel, self.text_length
        values = self.modulation(time_embedding)
        for_attention, for_mlp = modulations(values, text_length=text_length)
        if self.num_branches > 1:
            assert kernel != "sdpa" and self.shard is None, (kernel, self.shard)
            num_clips = len(tokens) // self.num_branches
            text, video = tokens[:, :text_length], tokens[:num_clips, text_length:]
            attended = attend_branches(
                self.query_key_value(for_attention.text.modulate(layer.input_layernorm(text))),
                self.query_key_value(for_attention.video.modulate(layer.input_layernorm(video))),
                kernel=kernel,
            )
        else:
            attention_input = for_attention.modulate(layer.input_layernorm(tokens))
            query_key_value = self.query_key_value(attention_input)
            attended = attend(*query_key_value, kernel=kernel, shard=self.shard)
        (attended,) = project(layer.attention.dense, attended.flatten(-2), num_parts=1)
        tokens = for_attention.add_gated(tokens, attended)

        mlp_input = for_mlp.modulate(layer.post_attention_layernorm(tokens))
        activation = layer.mlp.activation_func
        hidden = activated(layer.mlp.dense_h_to_4h, mlp_input, activation=activation)  # (b, n, 4d)
        return for_mlp.add_gated(tokens, layer.mlp.dense_4h_to_h(hidden))

    def query_key_value(self, attention_input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, each (b, n, heads, head_size), for tokens (b, n, d)."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_size))
            for part in project(self.layer.attention.query_key_value, attention_input, num_parts=3)
        )
        return self.query_norm(query), self.key_norm(key), value


def run_block(
    tokens: Tensor, time_embedding: Tensor, block: Block, *, policy: CheckpointingPolicy | None
) -> Tensor:
    """Return the result of `Block.run`; the backward pass recomputes what `policy` does not store.

    Everything that depends on the layer is an argument, so all layers share one compiled graph.
    """
    if policy is None:
        return block.run(tokens, time_embedding)
    return run_checkpointed(block.run, tokens, time_embedding, policy=policy)


def modulations(values: Tensor, *, text_length: int) -> tuple[JointModulation, JointModulation]:
    """Split `values` (b, 12 d) into the modulation of the attention and that of the MLP."""
    video, text = rearrange(
        values, "b (kind sublayer part d) -> kind sublayer part b 1 d", kind=2, sublayer=2, part=3
    )  # each (2, 3, b, 1, d)
    attention, mlp = (
        JointModulation(Modulation(*of_text), Modulation(*of_video), text_length)
        for of_text, of_video in zip(text, video, strict=True)
    )
    return attention, mlp
