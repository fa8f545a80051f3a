"""Step cache: some sampling steps skip most blocks, which is faster but changes the video.

A block's residual is what it adds to the tokens. Residuals differ little between neighbouring
steps, and the change of the first block's residual indicates the change of all others. Source: Liu
et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (2024), section 3.
The paper estimates the change from the modulated input of the first block, with coefficients fitted
to each model. The residual used here needs no fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sat.model.base_model import BaseMixin, BaseModel
from torch import Tensor


@contextmanager
def cached_steps(network: BaseModel, threshold: float) -> Iterator[None]:
    """Let `network` reuse the residuals of its blocks from earlier steps of one video.

    Args:
        network: the transformer; all tokens must be in this process.
        threshold: the other blocks are skipped if the first block's residual has changed by less
            than this fraction since the last full step; 0 turns the cache off.
    """
    if threshold == 0:
        yield
        return
    network.add_mixin("step_cache", StepCacheMixin(threshold, len(network.transformer.layers)))
    try:
        yield
    finally:
        network.del_mixin("step_cache")
        network.transformer.hooks.clear()  # the hooks refer to the mixin and its tensors


class StepCacheMixin(BaseMixin):
    """Runs in each step either all blocks of a transformer or only the first, by a hook of SAT.

    Args:
        threshold: see `cached_steps`.
        num_layers: number of blocks.
    """

    def __init__(self, threshold: float, num_layers: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.last_layer = num_layers - 1
        self._reusing = False
        # Values of the last full step, (b, n, d) each: the residual of the first block, the output
        # of the first block, and the sum of the residuals of all other blocks.
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
        """Run block `layer_id` by `old_impl` on tokens (b, n, d), or reuse the cached residuals."""
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
        """Return whether `added` is close to the first block's last cached residual.

        This waits for the device.
        """
        if self._first is None:
            return False
        change = (added - self._first).abs().mean() / self._first.abs().mean()
        return bool(change < self.threshold)
