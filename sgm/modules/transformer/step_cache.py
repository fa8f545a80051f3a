"""Reusing most of a sampling step in the next ones: faster, at the price of a slightly other video.

Neighbouring steps differ little in what the blocks add to the tokens, and what the first block
adds tells how little. Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video
Diffusion Model" (2024), section 3, which estimates the change from the first block's modulated
input; here it is that block's own contribution, for which no fit to a model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sat.model.base_model import BaseMixin, BaseModel
from torch import Tensor


@contextmanager
def cached_steps(network: BaseModel, threshold: float) -> Iterator[None]:
    """Within this context, which is one video, `network` may reuse what its blocks did a step ago.

    Args:
        network: all of its tokens are in this process.
        threshold: largest relative change of what the first block adds, since the last step that
            ran whole, at which the other blocks are left out; 0 leaves `network` as it is.
    """
    if threshold == 0:
        yield
        return
    network.add_mixin("step_cache", StepCacheMixin(threshold, len(network.transformer.layers)))
    try:
        yield
    finally:
        network.del_mixin("step_cache")
        network.transformer.hooks.clear()  # they hold the mixin, and so its tensors


class StepCacheMixin(BaseMixin):
    """Runs the blocks of a transformer through this hook of SAT's, or only the first of them.

    Args:
        threshold: see `cached_steps`.
        num_layers: blocks of the transformer.
    """

    def __init__(self, threshold: float, num_layers: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.last_layer = num_layers - 1
        self._reusing = False
        # Of the last step that ran whole, (b, n, d) each: what the first block added to the
        # tokens, what it gave, and what the other blocks then added.
        self._first: Tensor | None = None
        self._after_first: Tensor | None = None
        self._rest: Tensor | None = None

    @BaseMixin.non_conflict
    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor,
        *,
        old_impl: Callable[..., Tensor],
        layer_id: Tensor | int,
        **arguments: Any,
    ) -> Tensor:
        """Block `layer_id`, which `old_impl` computes, on tokens (b, n, d)."""
        layer = int(layer_id)
        if layer > 0 and self._reusing:
            return hidden_states + self._rest if layer == self.last_layer else hidden_states
        tokens = old_impl(hidden_states, mask, layer_id=layer_id, **arguments)
        if layer == 0:
            added = tokens - hidden_states
            self._reusing = self._is_close(added)
            if not self._reusing:
                self._first, self._after_first = added, tokens
        elif layer == self.last_layer:
            self._rest = tokens - self._after_first
        return tokens

    def _is_close(self, added: Tensor) -> bool:
        """Whether `added` is close enough to that of the last whole step; waits for the device."""
        if self._first is None:
            return False
        change = (added - self._first).abs().mean() / self._first.abs().mean()
        return bool(change < self.threshold)
