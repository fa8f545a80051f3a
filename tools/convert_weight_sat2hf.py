"""Convert weights in SAT's layout to a folder that diffusers' CogVideoXPipeline loads.

    python tools/convert_weight_sat2hf.py --transformer_ckpt_path RUN --vae_ckpt_path 3d-vae.pt \
        --text_encoder_path t5-v1_1-xxl --output_path DIR [--bf16] [--lora PATH[:SCALE] …]

Settings that cannot be derived from the weights (size of a clip, sampler …) are read from a
configuration: `--base`, otherwise the training_config.yaml of a run, otherwise the 2B model's.
Without any path option, the paths are read from the configuration too. A part without a path is not
written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, add_precision, run_and_exit, set_up_logging
from sgm.config import lora_from_text
from sgm.files import expanded, new_folder, refuse_existing
from tools.launch.choose_config import BUNDLED
from tools.weights.sources import OPTIONS, ROOT, choose_sources

# PyTorch and the modules that need it are imported after the command line is checked.

_USUAL_TEXT_LENGTH = 226  # diffusers' default
_SIZES = ("num_layers", "num_attention_heads")


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def _path(text: str) -> str:
    if not text:  # such as an unset shell variable
        raise ValueError
    return text


_path.__name__ = "path"
_positive.__name__ = "positive number"  # argparse prints this name in its message


def _loading_call(output: Path, present: Collection[str]) -> str:
    """Return the diffusers call that loads the folder; missing parts must be passed as None."""
    missing = [f"{name}=None" for name in (*OPTIONS, "tokenizer") if name not in present]
    return f"CogVideoXPipeline.from_pretrained({', '.join([repr(str(output)), *missing])})"


def build_parser() -> CommandParser:
    """Return the parser of this command; options may be spelled with _ or -."""
    parser = CommandParser(description="Convert weights from SAT's layout to diffusers.")
    add, add_path = partial(add_option, parser), partial(add_option, parser, type=_path)
    note = "the transformer: the folder of a run or of a checkpoint, or a file"
    add_path("transformer_ckpt_path", metavar="PATH", help=note)
    add_path("vae_ckpt_path", metavar="PATH", help="the autoencoder, such as 3d-vae.pt")
    add_path("text_encoder_path", metavar="DIR", help="the T5 folder")
    add_path("output_path", metavar="DIR", help="the new folder")
    note = "configuration files for settings that the weights do not contain"
    parser.add_argument("--base", nargs="+", metavar="YAML", help=note)
    loras = {"nargs": "+", "default": [], "type": lora_from_text, "metavar": "PATH[:SCALE]"}
    parser.add_argument("--lora", **loras, help="LoRAs to merge; SCALE 1: strength as trained")
    add("link_text_encoder", action="store_true", help="link the T5 files instead of copying them")
    add_precision(parser)
    for name in _SIZES:
        add(name, type=int, help="expected value; an error if the weights differ")
    add("scaling_factor", type=_positive, help="factor for latents (default: configuration)")
    add("snr_shift_scale", type=_positive, help="noise level shift (default: configuration)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, convert, print what was written, and return the exit code."""
    options = build_parser().parse_args(argv)
    set_up_logging()
    paths = {part: getattr(options, option[2:]) for part, option in OPTIONS.items()}
    given = {part: path for part, path in paths.items() if path is not None}
    config, sources = choose_sources(given, options.base)
    kind = "tiny" if config.files == [str(ROOT / BUNDLED)] else "2b"
    output = expanded(options.output_path or f"CogVideoX-{kind}-diffusers")
    refuse_existing(output)
    import torch

    from tools.weights.to_diffusers import DiffusersConverter

    converter = DiffusersConverter(
        config,
        sources,
        loras=options.lora,
        dtype=options.dtype and getattr(torch, options.dtype),
        scaling_factor=options.scaling_factor,
        snr_shift_scale=options.snr_shift_scale,
        sizes={key: getattr(options, key) for key in _SIZES},
    )
    present = converter.present
    with new_folder(output) as folder:
        converter.write(folder, link_text_encoder=options.link_text_encoder)
    print(f"wrote {output}; in diffusers: {_loading_call(output, present)}")
    if converter.text_length != _USUAL_TEXT_LENGTH:
        print(f"pass max_sequence_length={converter.text_length} to each call")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
