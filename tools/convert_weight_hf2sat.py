"""Convert the weights in a local diffusers folder of CogVideoX-2B to SAT's layout.

    python tools/convert_weight_hf2sat.py --input_path DIR --output_path DIR [--link_text_encoder]

The input is the folder of a pipeline, a transformer or an autoencoder. The output consists of
``transformer/latest``, ``transformer/1000/mp_rank_00_model_states.pt``, ``vae/3d-vae.pt`` and
``t5-v1_1-xxl/``. Parts that are not in the input are omitted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, add_option, add_precision, run_and_exit, set_up_logging
from sgm.files import expanded, new_folder, refuse_existing

# PyTorch and the modules that need it are imported after the command line is checked.


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, convert, print what was written, and return the exit code."""
    parser = CommandParser(
        description="Convert a diffusers folder of CogVideoX-2B to SAT's layout."
    )
    add_option(parser, "input_path", required=True, type=Path, metavar="DIR", help="input folder")
    add_option(parser, "output_path", required=True, metavar="DIR", help="the new folder")
    note = "create symbolic links to the T5 files instead of copies"
    add_option(parser, "link_text_encoder", action="store_true", help=note)
    add_precision(parser)
    options = parser.parse_args(argv)
    set_up_logging()
    output = expanded(options.output_path)
    refuse_existing(output)
    import torch

    from sgm.checkpoint.find import SAT_FILE
    from tools.weights.to_sat import T5_FOLDER, SatConverter

    dtype = options.dtype and getattr(torch, options.dtype)
    converter = SatConverter(expanded(options.input_path), dtype=dtype)
    with new_folder(output) as folder:
        converter.write(folder, link_text_encoder=options.link_text_encoder)
    print(f"wrote {output}; set in a configuration:")
    if sizes := converter.sizes.get("transformer"):
        layers, heads = sizes["num_layers"], sizes["num_attention_heads"]
        print(f"  args.load: {output / 'transformer'}  # {layers} layers, {heads} heads")
    if "vae" in converter.sizes:
        print(f"  model.first_stage_config.params.ckpt_path: {output / 'vae' / SAT_FILE}")
    if converter.text_encoder is not None:
        print(f"  model_dir of the FrozenT5Embedder: {output / T5_FOLDER}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
