"""Print the configuration that inference.sh runs when none is given.

    python tools/choose_config.py [flags of sample_video.py]

That is the 2B model's where the weights that it names exist, and else the bundled model's, after
saying on stderr what is missing. Run from the repository, to which the paths are relative.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

FULL = "configs/cogvideox_2b_infer.yaml"
BUNDLED = "configs/cogvideox_tiny_infer.yaml"


def weight_paths(config: Any, load: str | None = None) -> list[str]:
    """The paths of weights that a configuration names: transformer, VAE and text encoders.

    Args:
        config: the OmegaConf node of a whole file. Keys that are absent give no path.
        load: the flag of that name, which wins over the file's key.
    """
    paths = [load or OmegaConf.select(config, "args.load")]
    paths.append(OmegaConf.select(config, "model.first_stage_config.params.ckpt_path"))
    embedders = OmegaConf.select(config, "model.conditioner_config.params.emb_models")
    for embedder in embedders if OmegaConf.is_list(embedders) else []:
        if OmegaConf.is_dict(embedder):
            paths.append(OmegaConf.select(embedder, "params.model_dir"))
    return [path for path in paths if path and isinstance(path, str)]


def choose_config(load: str | None = None) -> tuple[str, list[str]]:
    """The configuration to run and the paths whose absence decided so.

    A file that cannot be read is chosen as it is: whoever runs it says what is wrong with it.
    """
    try:
        paths = weight_paths(OmegaConf.load(FULL), load)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException):
        return FULL, []
    missing = [path for path in paths if not Path(path).expanduser().exists()]
    return (BUNDLED if missing else FULL), missing


def main() -> None:
    """Print the choice, and on stderr the reason where it is not the 2B model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load", nargs="?")
    flags, _ = parser.parse_known_args()
    config, missing = choose_config(flags.load)
    if missing:
        print(
            f"{FULL} names weights that are not there: {', '.join(missing)}. How to get them: "
            f"'Getting the 2B weights' in README.md. Running the bundled model, {BUNDLED}, instead",
            file=sys.stderr,
        )
    print(config)


if __name__ == "__main__":
    main()
