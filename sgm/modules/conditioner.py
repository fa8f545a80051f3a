"""The conditioner turns the texts of a batch into the embeddings that condition the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError, nearest_name
from sgm.util import check_number, instantiate_from_config

_EMBEDDER_KEYS = ("target", "params", "is_trainable", "input_key", "ucg_rate")


class GeneralConditioner(nn.Module):
    """Runs the embedders of a configuration and concatenates their outputs.

    Args:
        emb_models: one node ``{target, params, input_key, is_trainable, ucg_rate}`` per embedder.
            `input_key` names the entry of the batch that the embedder reads. `is_trainable` says
            whether its weights are trained. `ucg_rate` (0 to 1) is the probability that a training
            sample's embedding is replaced by zeros, which teaches the network its unconditional
            prediction.
        with_embedders: False if batches contain embeddings already; the embedder is then not kept.
            There must be only one embedder in this case.
        dtype, device: dtype and device of the embedders' weights. On the device "meta" embedders
            are built and checked even if they are not kept; `load_weights` reads their values.

    An embedder is a module whose constructor takes `dtype` and `device` in addition to its own
    `params`, and whose `forward` maps texts to embeddings (b, n_text, d_text). It may also have:

    - ``width``: d_text, which is compared with the width that the network expects.
    - ``load_weights(device, *, streamed)``: reads the values after a build on the device "meta".
      With `streamed`, the weights of each block are on `device` only while the block runs.
    - ``warn_if_cut(text)``: logs a warning if `text` is too long.

    Raises:
        UserError: there is no embedder, or an embedder's node is invalid.
    """

    def __init__(
        self,
        emb_models: Sequence[Mapping[str, Any]],
        *,
        with_embedders: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.embedders = nn.ModuleList()
        self.input_keys: list[str] = []
        self.ucg_rates: list[float] = []
        widths: list[int | None] = []
        self._nodes = emb_models
        self._dtype = dtype
        if not emb_models:
            raise UserError(
                "conditioner_config: emb_models is empty; add a text encoder, for example "
                "sgm.modules.encoders.modules.FrozenT5Embedder"
            )
        for node in emb_models:
            for key in node:
                if key not in _EMBEDDER_KEYS:
                    raise UserError(
                        f"conditioner_config: unknown key {key!r} in emb_models; "
                        f"{nearest_name(key, _EMBEDDER_KEYS)}"
                    )
            self.input_keys.append(node.get("input_key", "txt"))
            rate = node.get("ucg_rate", 0.0)
            check_number("conditioner_config: ucg_rate", rate, low=0, high=1)
            self.ucg_rates.append(float(rate))
            if with_embedders or torch.device(device).type == "meta":
                embedder = self._build(node, device)
                widths.append(getattr(embedder, "width", None))
                if with_embedders:
                    self.embedders.append(embedder)
        # d_text of the embeddings; None if an embedder does not have the attribute `width`.
        known = [width for width in widths if width is not None]
        self.text_width = sum(known) if known and len(known) == len(widths) else None

    def _build(self, node: Mapping[str, Any], device: str | torch.device) -> nn.Module:
        config = {"target": node.get("target"), "params": node.get("params")}
        embedder = instantiate_from_config(config, dtype=self._dtype, device=device)
        if not node.get("is_trainable", False):
            embedder.eval().requires_grad_(False)
        return embedder

    def load_weights(self, device: str | torch.device, *, streamed: bool = False) -> None:
        """Read the values of embedders that were built on the device "meta".

        An embedder without a method `load_weights` is built again on `device`.

        Args:
            device: device of the weights.
            streamed: keep the weights of each block on `device` only while the block runs. This is
                for inference, and has no effect on embedders without a method `load_weights`.
        """
        for index, embedder in enumerate(self.embedders):
            if hasattr(embedder, "load_weights"):
                embedder.load_weights(device, streamed=streamed)
            else:
                self.embedders[index] = self._build(self._nodes[index], device)
        self.train(self.training)  # a rebuilt module is in training mode

    @property
    def is_trained(self) -> bool:
        """Whether the weights of any embedder are trained."""
        return any(weight.requires_grad for weight in self.parameters())

    def train(self, mode: bool = True) -> GeneralConditioner:
        """Set training mode; embedders that are not trained stay in evaluation mode."""
        super().train(mode)
        for embedder in self.embedders:
            trained = any(weight.requires_grad for weight in embedder.parameters())
            embedder.train(mode and trained)
        return self

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the conditioning of a batch.

        In training mode, each sample's embedding is set to zero with probability `ucg_rate`. The
        random numbers come from torch's global generator, after all texts have been embedded.

        Args:
            batch: holds texts, or their embeddings under ``crossattn`` (b, n_text, d_text).

        Returns:
            ``{"crossattn": (b, n_text, d_text)}``; the outputs of several embedders are
            concatenated along d_text.
        """
        if "crossattn" in batch:
            embeddings = [batch["crossattn"]]
        elif self.embedders:
            inputs = zip(self.embedders, self.input_keys, strict=True)
            embeddings = [embedder(batch[key]) for embedder, key in inputs]
        else:
            raise RuntimeError("this conditioner has no embedders, so batches need 'crossattn'")
        for i, ucg_rate in enumerate(self.ucg_rates):
            if self.training and ucg_rate > 0:
                kept = torch.rand(embeddings[i].shape[0], 1, 1) >= ucg_rate
                embeddings[i] = embeddings[i] * kept.to(embeddings[i])
        return {"crossattn": torch.cat(embeddings, dim=-1)}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of b texts, for inference. Log a warning if a text is too long.

        The conditioner must be in evaluation mode: training mode drops embeddings at random.
        """
        for embedder in self.embedders:
            if hasattr(embedder, "warn_if_cut"):
                for text in texts:
                    embedder.warn_if_cut(text)
        return self({key: texts for key in self.input_keys})

    @staticmethod
    def unconditional(cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros in the shape of `cond`, the unconditional embedding of the training.

        The embedding of an empty text would be different.
        """
        return {key: torch.zeros_like(embedding) for key, embedding in cond.items()}
