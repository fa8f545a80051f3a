"""Weights in SAT's layout to a folder that diffusers' CogVideoXPipeline loads.

    python tools/convert_weight_sat2hf.py --transformer_ckpt_path RUN --vae_ckpt_path 3d-vae.pt \
        --text_encoder_path t5-v1_1-xxl --output_path DIR [--bf16] [--lora PATH[:SCALE] …]

What the weights do not tell (size of a clip, sampler …) is in a configuration: `--base`, or else
the training_config.yaml of a run, or else the 2B model's. Without any path all paths come from it.
A part that is not named is not written.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import Config
from sgm.cli import CommandParser, add_option, add_precision, run_and_exit, set_up_logging
from sgm.errors import UserError
from sgm.files import new_folder, refuse_existing
from sgm.lora_choice import LoraChoice, lora_from_text
from tools.choose_config import BUNDLED
from tools.conversion_sources import ROOT, Sources, choose_sources, select, select_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sgm.checkpoint.table import Part
    from sgm.checkpoint.text_encoder import T5Files

logger = logging.getLogger(__name__)

_USUAL_TEXT_LENGTH = 226  # diffusers' own default
_SHIFT_SCALE = "model.sampler_config.params.discretization_config.params.shift_scale"


@dataclass
class _Part:
    """What becomes a folder: transformer or vae."""

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]


class Conversion:
    """Reads and checks the parts, then writes them.

    Args:
        config: what the weights do not tell.
        sources: the parts.
        loras: merged into the transformer.
        dtype: of the transformer; None keeps its own. The autoencoder is written in float32.
        scaling_factor: of the latents; None takes the configuration's.
        snr_shift_scale: of the noise levels; None takes the configuration's.
        num_layers, num_attention_heads: what the transformer must have; None for anything.

    Raises:
        UserError: something is absent, damaged, of another model, or does not go together.
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
        from sgm.checkpoint.blueprint import build_on_meta
        from sgm.checkpoint.diffusers_configs import geometry_of
        from sgm.checkpoint.text_encoder import find_t5
        from sgm.checkpoint.vae import holds_autoencoder

        self._config = config
        self._described_by = " + ".join(_shown(file) for file in config.files)
        self._scaling_factor = scaling_factor or select_number(config, "model.scale_factor", 1.0)
        self._network = build_on_meta(config.model.get("network_config"))
        self._geometry = geometry_of(config.model["network_config"]["params"])
        self.scheduler = self._scheduler(snr_shift_scale)
        self.text_encoder: T5Files | None = None
        if sources.text_encoder:
            option = sources.name("text_encoder")
            self.text_encoder = find_t5(sources.text_encoder, option=option)
        self.parts: list[_Part] = []
        wanted = {"num_layers": num_layers, "num_attention_heads": num_attention_heads}
        vae = sources.vae
        if sources.transformer:
            path = self._add_transformer(sources, loras, dtype=dtype, wanted=wanted)
            vae = vae or (str(path) if holds_autoencoder(path) else None)
        elif loras:
            raise UserError("--lora changes a transformer; name one in --transformer_ckpt_path")
        if vae:
            self._add_vae(vae, option=sources.name("vae"))

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, of which diffusers must be told at each call."""
        return self._geometry.text_length

    def _scheduler(self, snr_shift_scale: float | None) -> dict[str, Any]:
        from sgm.checkpoint.diffusers_configs import SCHEDULERS, scheduler_config

        target = str(select(self._config, "model.sampler_config.target", "none"))
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
        sources: Sources,
        loras: Sequence[LoraChoice],
        *,
        dtype: torch.dtype | None,
        wanted: Mapping[str, int | None],
    ) -> Path:
        """Returns the file or folder that the transformer is in."""
        from sgm.checkpoint.blueprint import sizes_of
        from sgm.checkpoint.diffusers_configs import transformer_config
        from sgm.checkpoint.fit import check_weights
        from sgm.checkpoint.lora_merging import merged_tensors
        from sgm.checkpoint.table import to_diffusers
        from sgm.checkpoint.transformer import read_transformer
        from sgm.checkpoint.writing import in_dtype

        option = sources.name("transformer")
        path, base, matrices = read_transformer(sources.transformer, option=option)
        if path.is_dir():
            logger.info("%s is in diffusers' layout already; it is written anew", path)
        if matrices and not loras:
            raise UserError(
                f"{path} holds LoRA matrices besides the base model; add "
                f"--lora {quote(sources.transformer)} to merge them, or convert the base model "
                "that it was trained on"
            )
        if matrices:
            logger.warning("%s holds LoRA matrices, merged if --lora names it too", path)
        sizes = sizes_of(base, "transformer", path)
        for key, value in wanted.items():
            if value is not None and value != sizes[key]:
                raise UserError(
                    f"--{key} is {value}, but {path} has {sizes[key]}; leave the option out, or "
                    "name the weights that it belongs to (only CogVideoX-2B's kind is converted)"
                )
        with self._naming_what_fits(base, "transformer"):
            check_weights(
                base, "transformer", self._network, where=path, described_by=self._described_by
            )
        if loras:
            tensors = merged_tensors(base, loras, where=path, dtype=dtype)
        else:
            tensors = in_dtype(base, dtype, where=path)
        tensors = to_diffusers(tensors, "transformer", where=path)
        config = transformer_config(sizes, self._geometry)
        self.parts.append(_Part("transformer", config, tensors))
        return path

    def _add_vae(self, source: str, *, option: str) -> None:
        import torch

        from sgm.checkpoint.blueprint import build_on_meta
        from sgm.checkpoint.diffusers_configs import vae_config
        from sgm.checkpoint.fit import check_weights
        from sgm.checkpoint.table import to_diffusers
        from sgm.checkpoint.vae import load_vae_state
        from sgm.checkpoint.writing import in_dtype

        state = load_vae_state(source, option=option)
        vae = build_on_meta(self._config.model.get("first_stage_config"))
        with self._naming_what_fits(state, "vae"):
            sizes = check_weights(state, "vae", vae, where=source, described_by=self._described_by)
        tensors = in_dtype(to_diffusers(state, "vae", where=source), torch.float32, where=source)
        config = vae_config(sizes, self._geometry, scaling_factor=self._scaling_factor)
        self.parts.append(_Part("vae", config, tensors))

    @contextmanager
    def _naming_what_fits(self, tensors: Mapping[str, Tensor], part: Part) -> Iterator[None]:
        """Adds to an error the shipped configuration that the weights belong to, if there is."""
        from sgm.checkpoint.known_models import compare
        from sgm.checkpoint.table import on_meta
        from tools.inspect_checkpoint import known_models

        try:
            yield
        except UserError as error:
            comparison = compare(on_meta(tensors), part, known_models())
            if not comparison.fits:
                raise
            fitting = quote(_nearby(ROOT / comparison.known.config))
            raise UserError(f"{error} ({fitting} fits)") from None

    def write(self, folder: Path, *, link_text_encoder: bool) -> None:
        """Write all parts into `folder`, which is within `new_folder`; to be called once."""
        from sgm.checkpoint.diffusers_configs import model_index, tokenizer_config
        from sgm.checkpoint.text_encoder import copy_text_encoder, place
        from sgm.checkpoint.writing import save_json, save_sharded

        names = {part.name for part in self.parts}
        while self.parts:  # a part that is written gives its mapped file back
            part = self.parts.pop(0)
            logger.info("writing %s", part.name)
            (folder / part.name).mkdir()
            save_json(folder / part.name / "config.json", part.config)
            save_sharded(folder / part.name, part.tensors)
            del part
            if self.parts:
                gc.collect()  # torch.load leaves cycles that hold the mapped file
        (folder / "scheduler").mkdir()
        save_json(folder / "scheduler" / "scheduler_config.json", self.scheduler)
        if self.text_encoder is not None:
            logger.info("%s text_encoder", "linking" if link_text_encoder else "copying")
            copy_text_encoder(self.text_encoder, folder / "text_encoder", link=link_text_encoder)
            tokenizer = folder / "tokenizer"
            tokenizer.mkdir()
            tokens = self.text_encoder.tokenizer
            place(tokens, tokenizer / tokens.name, link=False)
            config = tokenizer_config(self._geometry.text_length)
            save_json(tokenizer / "tokenizer_config.json", config)
        index = model_index(
            self.scheduler["_class_name"],
            transformer="transformer" in names,
            vae="vae" in names,
            text=self.text_encoder is not None,
        )
        save_json(folder / "model_index.json", index)


def _shown(file: str) -> str:
    """A shipped configuration by its name in the repository."""
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else file


def _nearby(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


_positive.__name__ = "positive number"  # argparse names it in its message


def _loading_call(output: Path, present: Collection[str]) -> str:
    """How diffusers loads the folder; of what is absent it must be told."""
    options = {
        "transformer": "--transformer_ckpt_path",
        "vae": "--vae_ckpt_path",
        "text_encoder": "--text_encoder_path",
        "tokenizer": "--text_encoder_path",
    }
    absent = [name for name in options if name not in present]
    call = ", ".join([repr(str(output)), *(f"{name}=None" for name in absent)])
    call = f"CogVideoXPipeline.from_pretrained({call})"
    if not absent:
        return call
    given_by = ", ".join(dict.fromkeys(options[name] for name in absent))
    return f"{call}, or with your own instead of None (not written without {given_by})"


def build_parser() -> CommandParser:
    """The parser of this command; each option is spelt with _ or -."""
    parser = CommandParser(description="Convert weights of SAT to diffusers.")
    add = partial(add_option, parser)
    add("transformer_ckpt_path", metavar="PATH", help="the transformer: a run, its folder, a file")
    add("vae_ckpt_path", metavar="PATH", help="the autoencoder, 3d-vae.pt")
    add("text_encoder_path", metavar="DIR", help="the T5 folder")
    add("output_path", metavar="DIR", help="the new folder")
    parser.add_argument("--base", nargs="+", metavar="YAML", help="what the weights do not tell")
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        type=lora_from_text,
        metavar="PATH[:SCALE]",
        help="LoRAs to merge; a scale of 1 is as trained",
    )
    add("link_text_encoder", action="store_true", help="link T5's files instead of copying them")
    add_precision(parser)
    for name in ("num_layers", "num_attention_heads"):
        add(name, type=int, help="only compared with the weights")
    add("scaling_factor", type=_positive, help="of the latents; default: the configuration's")
    add("snr_shift_scale", type=_positive, help="of the noise; default: the configuration's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, say what was written; returns the exit code."""
    options = build_parser().parse_args(argv)
    set_up_logging()
    import torch

    given = Sources(options.transformer_ckpt_path, options.vae_ckpt_path, options.text_encoder_path)
    config, sources = choose_sources(given, options.base)
    is_bundled = config.files == [str(ROOT / BUNDLED)]
    output = Path(
        options.output_path or f"CogVideoX-{'tiny' if is_bundled else '2b'}-diffusers"
    ).expanduser()
    refuse_existing(output)
    conversion = Conversion(
        config,
        sources,
        loras=options.lora,
        dtype=options.dtype and getattr(torch, options.dtype),
        scaling_factor=options.scaling_factor,
        snr_shift_scale=options.snr_shift_scale,
        num_layers=options.num_layers,
        num_attention_heads=options.num_attention_heads,
    )
    present = {part.name for part in conversion.parts}
    if conversion.text_encoder is not None:
        present |= {"text_encoder", "tokenizer"}
    with new_folder(output) as folder:
        conversion.write(folder, link_text_encoder=options.link_text_encoder)
    print(f"wrote {output}; in diffusers: {_loading_call(output, present)}")
    if conversion.text_length != _USUAL_TEXT_LENGTH:
        print(f"when calling it: max_sequence_length={conversion.text_length}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
