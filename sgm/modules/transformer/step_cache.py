"""Step cache: steps reuse the output of most blocks, which is faster but changes the video.

The residuals that the blocks add to the tokens differ little between neighbouring steps, and the
residual of the first block shows how much. Source: Liu et al., "Timestep Embedding Tells: It's Time
to Cache for Video Diffusion Model" (2024), section 3. There the change is estimated from the
modulated input of the first block; here from its residual, which needs no fit to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sat.model.base_model import BaseMixin, BaseModel
from torch import Tensor


@contextmanager
def cached_steps(network: BaseModel, threshold: float) -> Iterator[None]:
    """Let `network` reuse the output of its blocks from earlier steps, for one video.

    Args:
        network: the transformer; all of its tokens are in this process.
        threshold: largest relative change of the first block's residual, since the last full step,
            at which the other blocks are skipped; 0 turns the cache off.
    """
    if threshold == 0:
        yield
        return
    network.add_mixin("step_cache", StepCacheMixin(threshold, len(network.transformer.layers)))
    try:
        yield
    finally:
        network.del_mixin("step_cache")
        network.transformer.hooks.clear()  # they refer to the mixin and its tensors


class StepCacheMixin(BaseMixin):
    """Runs either all blocks of a transformer or only the first one, by a hook of SAT.

    Args:
        threshold: see `cached_steps`.
        num_layers: blocks of the transformer.
    """

    def __init__(self, threshold: float, num_layers: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.last_layer = num_layers - 1
        self._reusing = False
        # From the last full step, (b, n, d) each: the residual of the first block, its output, and
        # the residual of all other blocks.
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
        **arguments: object,
    ) -> Tensor:
        """Run block `layer_id` by `old_impl` on tokens (b, n, d), or reuse the last full step."""
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
        """Whether `added` is close to that of the last full step; waits for the device."""
        if self._first is None:
            return False
        change = (added - self._first).abs().mean() / self._first.abs().mean()
        return bool(change < self.threshold)
