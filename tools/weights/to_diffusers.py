"""Convert the parts of a model in SAT's layout to a diffusers folder."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sgm.checkpoint.find import T5Files, Weights, find_t5, find_transformer
from sgm.checkpoint.lora import merged_tensors
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.table import to_diffusers
from sgm.checkpoint.tensors import in_dtype, on_meta
from sgm.checkpoint.text_encoder import check_t5
from sgm.checkpoint.transformer import read_transformer
from sgm.checkpoint.vae import holds_autoencoder, load_vae_state
from sgm.config import Config, LoraChoice
from sgm.errors import UserError
from sgm.util import build_on_meta, is_finite_number
from tools.weights.diffusers_configs import (
    SCHEDULERS,
    geometry_of,
    model_index,
    scheduler_config,
    tokenizer_config,
    transformer_config,
    vae_config,
)
from tools.weights.sizes import check_sizes, fitting_config, needed, sizes_of
from tools.weights.sources import OPTIONS, ROOT
from tools.weights.writing import copy_text_encoder, save_json, save_sharded

logger = logging.getLogger(__name__)


_SHIFT_SCALE = "sampler_config.params.discretization_config.params.shift_scale"


class DiffusersConverter:
    """Reads and checks the parts of a model in SAT's layout, then writes a diffusers folder.

    Args:
        config: provides everything that cannot be derived from the weights.
        sources: part → path, as returned by `choose_sources`.
        loras: the LoRAs to merge into the transformer.
        dtype: the dtype of the written transformer; None keeps the dtype of its file. The
            autoencoder is always written in float32.
        scaling_factor: the factor that scales latents; None uses the configuration's factor.
        snr_shift_scale: the shift of the noise levels; None uses the configuration's shift.
        sizes: sizes that the transformer must have, like the argument `expected` of `check_sizes`.

    Raises:
        UserError: a part is missing, damaged, of another model, or does not fit the others.
    """

    def __init__(
        self,
        config: Config,
        sources: Mapping[str, str],
        *,
        loras: Sequence[LoraChoice],
        dtype: torch.dtype | None,
        scaling_factor: float | None,
        snr_shift_scale: float | None,
        sizes: Mapping[str, int | None],
    ) -> None:
        self._config = config
        self._described_by = " + ".join(config.files)
        self._scaling_factor = scaling_factor or self._number("scale_factor")
        self._network = build_on_meta(config.model.get("network_config", {}))
        self._geometry = geometry_of(config.model["network_config"]["params"])
        shift = snr_shift_scale or self._number(_SHIFT_SCALE)
        self._scheduler = scheduler_config(self._scheduler_name(), snr_shift_scale=shift)
        self.text_encoder: T5Files | None = None
        if path := sources.get("text_encoder"):
            self.text_encoder = find_t5(path, option=OPTIONS["text_encoder"])
            check_t5(self.text_encoder, dtype=torch.float32)
            self.text_encoder.release()
        # Name of each part to write → its config.json and its tensors.
        self._parts: dict[str, tuple[dict[str, Any], Mapping[str, Tensor]]] = {}
        vae: str | Weights | None = sources.get("vae")
        if path := sources.get("transformer"):
            found = find_transformer(path, option=OPTIONS["transformer"])
            self._add_transformer(found, loras, dtype=dtype, expected=sizes)
            vae = vae or (found if holds_autoencoder(found) else None)
        elif loras:
            raise UserError("--lora needs a transformer; name it in --transformer_ckpt_path")
        if vae:
            self._add_vae(vae)

    @property
    def text_length(self) -> int:
        """The number of tokens of a prompt, which every call of the diffusers pipeline needs."""
        return self._geometry["max_text_seq_length"]

    @property
    def present(self) -> set[str]:
        """The names of the parts to write, besides the scheduler."""
        texts = {"text_encoder", "tokenizer"} if self.text_encoder is not None else set()
        return {*self._parts, *texts}

    def _select(self, key: str) -> Any:
        """Return the value of a dotted key in the section `model`; None if it is missing."""
        return OmegaConf.select(OmegaConf.create(self._config.model), key)

    def _number(self, key: str) -> float:
        """Return the positive number at a dotted key in the section `model`; 1 if none is set."""
        value = self._select(key)
        if value is None:
            return 1.0
        if not (is_finite_number(value) and value > 0):
            raise UserError(
                f"{self._described_by}: model.{key}={value!r} must be a positive number"
            )
        return float(value)

    def _scheduler_name(self) -> str:
        target = str(self._select("sampler_config.target"))
        name = SCHEDULERS.get(target.rpartition(".")[2])
        if name is None:
            raise UserError(
                f"{self._described_by}: diffusers has no scheduler for the sampler {target!r}; "
                f"use {' or '.join(SCHEDULERS)}"
            )
        return name

    def _add_transformer(
        self,
        found: Weights,
        loras: Sequence[LoraChoice],
        *,
        dtype: torch.dtype | None,
        expected: Mapping[str, int | None],
    ) -> None:
        path, base, matrices = read_transformer(found)
        if matrices and not loras:
            raise UserError(
                f"{path} holds LoRA matrices besides the base model; add --lora "
                f"{quote(str(found))} to merge them, or convert the base model that it was "
                "trained on"
            )
        if matrices:
            logger.warning("%s has LoRA matrices, which are merged only if --lora names it", path)
        sizes = self._check(base, "transformer", self._network, where=path)
        hint = "omit the option, or name the weights with this size"
        check_sizes(sizes, expected, where=path, described_by="the option", hint=hint)
        merged = merged_tensors(base, loras, where=path, dtype=dtype)
        tensors = to_diffusers(merged, "transformer", where=path)
        self._parts["transformer"] = transformer_config(sizes, self._geometry), tensors

    def _add_vae(self, source: str | Weights) -> None:
        where = str(source)
        state = load_vae_state(source, option=OPTIONS["vae"])
        model = build_on_meta(self._config.model.get("first_stage_config", {}))
        sizes = self._check(state, "vae", model, where=where)
        tensors = in_dtype(to_diffusers(state, "vae", where=where), torch.float32, where=where)
        config = vae_config(sizes, self._geometry, scaling_factor=self._scaling_factor)
        self._parts["vae"] = config, tensors

    def _check(
        self,
        tensors: Mapping[str, Tensor],
        part: Literal["transformer", "vae"],
        model: nn.Module,
        *,
        where: str | Path,
    ) -> dict[str, Any]:
        """Compare weights with the configuration's model, and return the sizes of the weights.

        If they differ, the error also names a shipped configuration that fits the weights, if any.
        """
        metas, wanted, name = on_meta(tensors), model.state_dict(), self._described_by
        hint = "copy the file again, or name its configuration with --base"
        try:
            sizes, expected = sizes_of(metas, part, where), sizes_of(wanted, part, name)
            check_sizes(sizes, expected, where=where, described_by=name, hint=hint)
            check_fit(metas, needed(wanted, metas), path=where, hint=hint)
        except UserError as error:
            config = fitting_config(metas, part)
            if config is None:
                raise
            raise UserError(f"{error} ({quote(str(ROOT / config))} matches)") from None
        return sizes

    def write(self, folder: Path, *, link_text_encoder: bool) -> None:
        """Write all parts to `folder`, which `new_folder` has yielded; can be called once only."""
        index = model_index(self._scheduler["_class_name"], self.present)
        while self._parts:  # drop each written part, which closes its mapped file
            name = next(iter(self._parts))
            config, tensors = self._parts.pop(name)
            logger.info("writing %s", name)
            (folder / name).mkdir()
            save_json(folder / name / "config.json", config)
            save_sharded(folder / name, tensors)
            del tensors
            if self._parts:
                gc.collect()  # torch.load leaves reference cycles that keep the file mapped
        (folder / "scheduler").mkdir()
        save_json(folder / "scheduler" / "scheduler_config.json", self._scheduler)
        if self.text_encoder is not None:
            copy_text_encoder(self.text_encoder, folder / "text_encoder", link=link_text_encoder)
            file, tokenizer = self.text_encoder.tokenizer, folder / "tokenizer"
            tokenizer.mkdir()
            shutil.copyfile(file, tokenizer / file.name)
            save_json(tokenizer / "tokenizer_config.json", tokenizer_config(self.text_length))
        save_json(folder / "model_index.json", index)
