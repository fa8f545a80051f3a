"""From the parts of a model in SAT's layout to a diffusers folder: read, check, write."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgm.checkpoint.find import T5Files, Weights, find_t5, find_transformer
from sgm.checkpoint.lora import merged_tensors
from sgm.checkpoint.table import to_diffusers
from sgm.checkpoint.tensors import in_dtype, on_meta
from sgm.checkpoint.text_encoder import check_t5
from sgm.checkpoint.transformer import read_transformer
from sgm.checkpoint.vae import holds_autoencoder, load_vae_state
from sgm.config import Config, LoraChoice
from sgm.errors import UserError
from sgm.util import build_on_meta
from tools.weights.diffusers_configs import (
    SCHEDULERS,
    geometry_of,
    model_index,
    scheduler_config,
    tokenizer_config,
    transformer_config,
    vae_config,
)
from tools.weights.sizes import check_part, compare, sizes_of
from tools.weights.sources import ROOT, Sources, select, select_number
from tools.weights.writing import copy_text_encoder, save_json, save_sharded

logger = logging.getLogger(__name__)


_SAMPLER = "sampler_config.target"
_SHIFT_SCALE = "sampler_config.params.discretization_config.params.shift_scale"


@dataclass
class _Part:
    """A folder to write: transformer or vae."""

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]


class DiffusersConverter:
    """Reads and checks the parts of a model in SAT's layout, then writes a diffusers folder.

    Args:
        config: what the weights do not show.
        sources: the paths of the parts.
        loras: merged into the transformer.
        dtype: of the transformer; None keeps its own. The autoencoder is written in float32.
        scaling_factor: of the latents; None takes the configuration's.
        snr_shift_scale: of the noise levels; None takes the configuration's.
        num_layers, num_attention_heads: what the transformer must have; None for anything.

    Raises:
        UserError: a part is missing, damaged, of another model, or does not fit the others.
    """

    def __init__(
        self,
        config: Config,
        sources: Sources,
        *,
        loras: Sequence[LoraChoice] = (),
        dtype: torch.dtype | None = None,
        scaling_factor: float | None = None,
        snr_shift_scale: float | None = None,
        num_layers: int | None = None,
        num_attention_heads: int | None = None,
    ) -> None:
        self._config = config
        self._described_by = " + ".join(
            str(Path(file).relative_to(ROOT)) if Path(file).is_relative_to(ROOT) else file
            for file in config.files
        )
        self._scaling_factor = scaling_factor or select_number(config, "scale_factor", 1.0)
        self._network = build_on_meta(config.model.get("network_config"))
        self._geometry = geometry_of(config.model["network_config"]["params"])
        self._scheduler = self._scheduler_config(snr_shift_scale)
        self.text_encoder: T5Files | None = None
        if sources.text_encoder:
            option = sources.name("text_encoder")
            self.text_encoder = find_t5(sources.text_encoder, option=option)
            check_t5(self.text_encoder, dtype=torch.float32)
            self.text_encoder.release()
        self._parts: list[_Part] = []
        vae: str | Weights | None = sources.vae
        if sources.transformer:
            option = sources.name("transformer")
            found = find_transformer(sources.transformer, option=option)
            given = {"num_layers": num_layers, "num_attention_heads": num_attention_heads}
            self._add_transformer(found, loras, dtype=dtype, given=given)
            vae = vae or (found if holds_autoencoder(found) else None)
        elif loras:
            raise UserError("--lora changes a transformer; name one in --transformer_ckpt_path")
        if vae:
            self._add_vae(vae, option=sources.name("vae"))

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, which diffusers needs at each call."""
        return self._geometry["max_text_seq_length"]

    @property
    def present(self) -> set[str]:
        """Names of the parts that are written, besides the scheduler."""
        texts = {"text_encoder", "tokenizer"} if self.text_encoder is not None else set()
        return {part.name for part in self._parts} | texts

    def _scheduler_config(self, snr_shift_scale: float | None) -> dict[str, Any]:
        target = str(select(self._config, _SAMPLER, "none"))
        name = SCHEDULERS.get(target.rpartition(".")[2])
        if name is None:
            raise UserError(
                f"{self._described_by}: diffusers has no scheduler for the sampler {target!r}; "
                f"known are {' and '.join(SCHEDULERS)}"
            )
        shift = snr_shift_scale or select_number(self._config, _SHIFT_SCALE, 1.0)
        return scheduler_config(name, snr_shift_scale=shift)

    def _add_transformer(
        self,
        found: Weights,
        loras: Sequence[LoraChoice],
        *,
        dtype: torch.dtype | None,
        given: Mapping[str, int | None],
    ) -> None:
        path, base, matrices = read_transformer(found)
        if found.is_folder:
            logger.info("%s is in diffusers' layout already; it is written anew", path)
        if matrices and not loras:
            raise UserError(
                f"{path} holds LoRA matrices besides the base model; add --lora "
                f"{quote(str(found))} to merge them, or convert the base model that it was "
                "trained on"
            )
        if matrices:
            logger.warning("%s holds LoRA matrices, merged if --lora names it too", path)
        sizes = sizes_of(base, "transformer", path)
        for key, value in given.items():
            if value not in (None, sizes[key]):
                raise UserError(
                    f"--{key} is {value}, but {path} has {sizes[key]}; leave the option out, or "
                    "name the weights that it belongs to (only CogVideoX-2B is supported)"
                )
        self._check(base, "transformer", self._network, where=path)
        merged = merged_tensors(base, loras, where=path, dtype=dtype)
        tensors = to_diffusers(merged, "transformer", where=path)
        config = transformer_config(sizes, self._geometry)
        self._parts.append(_Part("transformer", config, tensors))

    def _add_vae(self, source: str | Weights, *, option: str) -> None:
        where = str(source)
        state = load_vae_state(source, option=option)
        vae = build_on_meta(self._config.model.get("first_stage_config"))
        sizes = self._check(state, "vae", vae, where=where)
        tensors = in_dtype(to_diffusers(state, "vae", where=where), torch.float32, where=where)
        config = vae_config(sizes, self._geometry, scaling_factor=self._scaling_factor)
        self._parts.append(_Part("vae", config, tensors))

    def _check(
        self,
        tensors: Mapping[str, Tensor],
        part: Literal["transformer", "vae"],
        model: nn.Module,
        *,
        where: str | Path,
    ) -> dict[str, Any]:
        """`check_part` with the configuration; the error also names a shipped one that fits."""
        try:
            return check_part(
                tensors,
                part,
                where=where,
                described_by=self._described_by,
                expected=sizes_of(model.state_dict(), part, self._described_by),
                model=model,
                hint="copy the file again, or name its configuration with --base",
            )
        except UserError as error:
            comparison = compare(on_meta(tensors), part)
            if not comparison.fits:
                raise
            path, here = ROOT / comparison.config, Path.cwd()
            shown = path.relative_to(here) if path.is_relative_to(here) else path
            raise UserError(f"{error} ({quote(str(shown))} fits)") from None

    def write(self, folder: Path, *, link_text_encoder: bool) -> None:
        """Write all parts into `folder`, which is within `new_folder`; to be called once."""
        index = model_index(self._scheduler["_class_name"], self.present)
        while self._parts:  # the mapped file of a part is closed after the part is written
            part = self._parts.pop(0)
            logger.info("writing %s", part.name)
            (folder / part.name).mkdir()
            save_json(folder / part.name / "config.json", part.config)
            save_sharded(folder / part.name, part.tensors)
            del part
            if self._parts:
                gc.collect()  # torch.load leaves cycles that hold the mapped file
        (folder / "scheduler").mkdir()
        save_json(folder / "scheduler" / "scheduler_config.json", self._scheduler)
        if self.text_encoder is not None:
            logger.info("%s text_encoder", "linking" if link_text_encoder else "copying")
            copy_text_encoder(self.text_encoder, folder / "text_encoder", link=link_text_encoder)
            file, tokenizer = self.text_encoder.tokenizer, folder / "tokenizer"
            tokenizer.mkdir()
            shutil.copyfile(file, tokenizer / file.name)
            save_json(tokenizer / "tokenizer_config.json", tokenizer_config(self.text_length))
        save_json(folder / "model_index.json", index)
