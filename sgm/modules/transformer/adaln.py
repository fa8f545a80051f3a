"""A transformer block whose norms are steered by the diffusion time, apart for text and video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from sat.model.base_model import BaseMixin
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sgm.distributed import SequenceShare
from sgm.modules.transformer.attention import (
    ATTENTION_OPERATORS,
    Kernel,
    attend,
    attend_branches,
    choose_kernel,
)
from sgm.modules.transformer.linear import activated, project

# "block": its input alone. "attention": the attention's result too, which takes as much memory
# again and is the dearest to compute: its work grows with the square of the number of tokens.
Keep = Literal["block", "attention"]


def run_checkpointed(block: Callable[..., Tensor], *inputs: Tensor, keep: Keep) -> Tensor:
    """``block(*inputs)``, of which the backward pass computes again what is not kept.

    Dropout draws the same the second time. SAT has checkpointing of its own, but it is re-entrant
    (it needs an input with gradient), and where DeepSpeed is imported first it is DeepSpeed's,
    which recomputes outside autocast and moves a CPU model's tensors to the GPU.
    """
    options: dict[str, Any] = {}
    if keep == "attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(block, *inputs, use_reentrant=False, **options)


def _keep_attention(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operator in ATTENTION_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


QK_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one sub-layer for one kind of token, each (b, 1, d)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def modulate(self, normed: Tensor) -> Tensor:
        """The input of the sub-layer, from this kind's tokens of the first samples, (m, n, d).

        Those of other samples may be absent, being the same.
        """
        num_samples = len(normed)
        return modulate(normed, self.shift[:num_samples], scale=self.scale[:num_samples])


@dataclass(frozen=True)
class JointModulation:
    """The modulation of one sub-layer; the first `text_length` tokens are text, the rest video.

    One by one, operations are fastest on text and video apart. Compiled, they become one kernel
    with the norms around them, if each token chooses its values instead.
    """

    text: Modulation
    video: Modulation
    text_length: int

    def modulate(self, normed: Tensor) -> Tensor:
        """The input of the sub-layer: ``normed * (1 + scale) + shift``, (b, n, d)."""
        if torch.compiler.is_compiling():
            shift, scale = self._of_tokens("shift", normed), self._of_tokens("scale", normed)
            return modulate(normed, shift, scale=scale)
        text, video = normed[:, : self.text_length], normed[:, self.text_length :]
        return torch.cat([self.text.modulate(text), self.video.modulate(video)], dim=1)

    def add_gated(self, tokens: Tensor, update: Tensor) -> Tensor:
        """The sub-layer's result: ``tokens + gate * update``, (b, n, d)."""
        if torch.compiler.is_compiling():
            return torch.addcmul(tokens, self._of_tokens("gate", tokens), update)
        text, video = tokens[:, : self.text_length], tokens[:, self.text_length :]
        text_update, video_update = update[:, : self.text_length], update[:, self.text_length :]
        return torch.cat(
            [
                torch.addcmul(text, self.text.gate, text_update),
                torch.addcmul(video, self.video.gate, video_update),
            ],
            dim=1,
        )

    def _of_tokens(self, name: str, tokens: Tensor) -> Tensor:
        """Shift, scale or gate of each token, (b, n, d)."""
        is_text = torch.arange(tokens.shape[1], device=tokens.device) < self.text_length
        text, video = getattr(self.text, name), getattr(self.video, name)
        return torch.where(is_text[:, None], text, video)


def modulate(normed: Tensor, shift: Tensor, *, scale: Tensor) -> Tensor:
    """``normed * (1 + scale) + shift``; normed (b, n, d), shift and scale broadcast to it."""
    return torch.addcmul(shift, normed, 1 + scale)


class AdaLNMixin(BaseMixin):
    """Expert adaptive LayerNorm around SAT's attention and MLP (CogVideoX, section 2.2).

    Both kinds of token share the weights of a block, norms included, and differ only in shift,
    scale and gate, which a Linear per layer makes of the time embedding. These Linears start at
    zero, so that a fresh block is the identity (adaLN-Zero; Peebles and Xie, "Scalable Diffusion
    Models with Transformers", section 3.2).

    A block calls the Linears of SAT's layer, or the LoRA layers in their place, and none of
    SAT's hooks within a layer, so that it compiles as a whole.

    Args:
        num_layers: blocks of the transformer.
        hidden_size: width d of a token.
        head_size: width of an attention head.
        time_embed_dim: width of the time embedding.
        qk_ln: normalise the queries and keys of each head.
        elementwise_affine: these norms have weight and bias.
        checkpoint_activations: keep only the input of each block for the backward pass and
            compute the rest again there.

    Attributes:
        checkpoint_keep: what is kept of a block for the backward pass; None for everything.
        attention: what computes it, "auto" for the fastest kernel that there is.
        own_kernel_pays: whether that may be this project's own, as it is until it is found to
            compute too much twice.
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
        self.checkpoint_keep: Keep | None = "block" if checkpoint_activations else None
        self.attention: Kernel | Literal["auto"] = "auto"
        self.own_kernel_pays = True
        self.qk_ln = qk_ln
        self.head_size = head_size
        self._run_block = run_block
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

    def compile_blocks(self, *, tune: bool) -> None:
        """Compile the block, once for all layers, in its first call.

        With `tune` that call also looks for better settings of the kernels, which takes half a
        minute and makes a training step 1% faster; sampling gains nothing from it. Each shape of
        the tokens, evaluation beside training, and the first layer where branches of guidance share
        its video tokens cost a compilation of their own; past PyTorch's limit of 8 further ones run
        as they are.
        """
        options = {
            "coordinate_descent_tuning": tune,
            # What a norm's backward pass needs is cheaper to compute again from tokens in half
            # precision than to keep in float32, as PyTorch does with what is used twice and reads
            # more than 4 tensors; no norm here reads 12.
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
        share: SequenceShare | None = None,
        **_: Any,
    ) -> Tensor:
        """Block `layer_id` on tokens (b, n, d) with time embedding (b, time_embed_dim).

        The tokens are those of `num_branches` branches of guidance, of the same clips: the first
        block computes once what these share. With a `share`, tokens are this process's. `mask` is
        what SAT hands on; attention here is full and does not read it.
        """
        # SAT gives the layer as a CPU tensor; int() of it waits for no GPU.
        layer = int(layer_id)
        parts = self.block_parts(layer)
        tokens = hidden_states
        kernel = self.attention
        if kernel == "auto":
            kernel = choose_kernel(tokens, head_size=self.head_size, own=self.own_kernel_pays)
        # Before the first block video tokens have not met the text. Not in training, which has one
        # branch: no gradient goes through the log-sum-exp that joins what is shared.
        has_gradient = torch.is_grad_enabled()
        is_video_shared = layer == 0 and kernel != "sdpa" and share is None and not has_gradient
        if self._run_block is not run_block and has_gradient:
            # With LoRA the first layer's input has no gradient; one that is thrown away costs less
            # than to compile a second graph.
            tokens = tokens if tokens.requires_grad else tokens.detach().requires_grad_()
        return self._run_block(
            tokens,
            time_embedding,
            parts,
            text_length=text_length if share is None else share.own_text_length(text_length),
            head_size=self.head_size,
            kernel=kernel,
            num_branches=num_branches if is_video_shared else 1,
            share=share,
            keep=self.checkpoint_keep if has_gradient else None,
        )

    def block_parts(self, layer_id: int) -> BlockParts:
        """The modules of a block: SAT's layer and what this mixin adds to it."""
        norms = (nn.Identity(), nn.Identity())
        if self.qk_ln:
            norms = (self.query_layernorm_list[layer_id], self.key_layernorm_list[layer_id])
        return BlockParts(
            self.transformer.layers[layer_id], self.adaLN_modulations[layer_id], *norms
        )


class BlockParts(NamedTuple):
    """The modules of one block."""

    layer: nn.Module
    modulation: nn.Module
    query_norm: nn.Module
    key_norm: nn.Module


def run_block(
    tokens: Tensor,
    time_embedding: Tensor,
    parts: BlockParts,
    *,
    keep: Keep | None,
    **settings: Any,
) -> Tensor:
    """A block on tokens (b, n, d); of its inner results only `keep` stays for the backward pass.

    The settings are those of `_block`. With more than one branch of guidance, video tokens have to
    be the same in all.

    A function of all that it needs: compiled, it is the same graph for every layer with as many.
    """
    block = partial(_block, parts=parts, **settings)
    if keep is None:
        return block(tokens, time_embedding)
    return run_checkpointed(block, tokens, time_embedding, keep=keep)


def _block(
    tokens: Tensor,
    time_embedding: Tensor,
    *,
    parts: BlockParts,
    text_length: int,
    head_size: int,
    kernel: Kernel,
    num_branches: int,
    share: SequenceShare | None,
) -> Tensor:
    layer = parts.layer
    for_attention, for_mlp = modulations(parts.modulation(time_embedding), text_length=text_length)

    query_key_value = partial(_query_key_value, parts=parts, head_size=head_size)
    if num_branches > 1:
        assert kernel != "sdpa" and share is None, (kernel, share)
        num_clips = len(tokens) // num_branches
        text, video = tokens[:, :text_length], tokens[:num_clips, text_length:]
        attended = attend_branches(
            query_key_value(for_attention.text.modulate(layer.input_layernorm(text))),
            query_key_value(for_attention.video.modulate(layer.input_layernorm(video))),
            kernel=kernel,
        )
    else:
        attention_input = for_attention.modulate(layer.input_layernorm(tokens))
        attended = attend(*query_key_value(attention_input), kernel=kernel, share=share)
    (attended,) = project(layer.attention.dense, attended.flatten(-2), num_parts=1)
    tokens = for_attention.add_gated(tokens, attended)

    mlp_input = for_mlp.modulate(layer.post_attention_layernorm(tokens))
    hidden = activated(  # (b, n, 4d)
        layer.mlp.dense_h_to_4h, mlp_input, activation=layer.mlp.activation_func
    )
    return for_mlp.add_gated(tokens, layer.mlp.dense_4h_to_h(hidden))


def _query_key_value(
    attention_input: Tensor, *, parts: BlockParts, head_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens (b, n, d) bring to the attention, (b, n, heads, head_size) each."""
    query, key, value = (
        part.unflatten(-1, (-1, head_size))
        for part in project(parts.layer.attention.query_key_value, attention_input, num_parts=3)
    )
    return parts.query_norm(query), parts.key_norm(key), value


def modulations(values: Tensor, *, text_length: int) -> tuple[JointModulation, JointModulation]:
    """Modulations of a block's attention and of its MLP, from (b, 12 d)."""
    video, text = rearrange(
        values, "b (kind sublayer part d) -> kind sublayer part b 1 d", kind=2, sublayer=2, part=3
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
