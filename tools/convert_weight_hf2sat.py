"""Weights of a local diffusers folder of CogVideoX-2B to SAT's layout.

    python tools/convert_weight_hf2sat.py --input_path DIR --output_path DIR [--link_text_encoder]

The input is a pipeline's folder, or that of a transformer or an autoencoder alone. Written are
``transformer/latest``, ``transformer/1000/mp_rank_00_model_states.pt``, ``vae/3d-vae.pt`` and
``t5-v1_1-xxl/``, as far as the input has them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, add_precision, run_and_exit, set_up_logging
from sgm.files import new_folder, refuse_existing

# PyTorch, and what reads weights with it, is imported once the command line is known to be right.


def build_parser() -> CommandParser:
    """The parser of this command; each option is spelt with _ or -."""
    parser = CommandParser(
        description="Convert a diffusers folder of CogVideoX-2B to SAT's layout."
    )
    add_option(parser, "input_path", required=True, type=Path, metavar="DIR", help="what is read")
    add_option(parser, "output_path", required=True, metavar="DIR", help="the new folder")
    add_option(
        parser,
        "link_text_encoder",
        action="store_true",
        help="link T5's files instead of copying them",
    )
    add_precision(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, say what was written; returns the exit code."""
    options = build_parser().parse_args(argv)
    set_up_logging()
    output = Path(options.output_path).expanduser()
    refuse_existing(output)
    import torch

    from sgm.checkpoint.find import SAT_FILE
    from tools.weights.to_sat import T5_FOLDER, SatConverter

    dtype = options.dtype and getattr(torch, options.dtype)
    conversion = SatConverter(options.input_path.expanduser(), dtype=dtype)
    with new_folder(output) as folder:
        conversion.write(folder, link_text_encoder=options.link_text_encoder)
    print(f"wrote {output}; in a configuration:")
    if "transformer" in conversion.sizes:
        sizes = conversion.sizes["transformer"]
        print(
            f"  args.load: {output / 'transformer'}  # {sizes['num_layers']} layers, "
            f"{sizes['num_attention_heads']} heads"
        )
    if "vae" in conversion.sizes:
        print(f"  model.first_stage_config.params.ckpt_path: {output / 'vae' / SAT_FILE}")
    if conversion.text_encoder is not None:
        print(f"  model_dir of the FrozenT5Embedder: {output / T5_FOLDER}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
