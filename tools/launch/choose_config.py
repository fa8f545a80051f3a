"""Print the configuration that inference.sh or finetune.sh runs when none is given.

    python tools/launch/choose_config.py [flags of sample_video.py]
    python tools/launch/choose_config.py --train [flags of train_video.py]

It is the configuration of the 2B model if the weights (and training data) that it names exist.
Otherwise it is that of the bundled model, and stderr says what is missing. Run it from the
repository, since its paths are relative. A path that a flag names must exist.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sgm.preflight import weight_paths

FULL = "configs/cogvideox_2b_infer.yaml"
BUNDLED = "configs/cogvideox_tiny_infer.yaml"
FULL_TRAIN = "configs/cogvideox_2b_sft.yaml"
BUNDLED_TRAIN = "configs/cogvideox_tiny_sft.yaml"
LESSON = "configs/cogvideox_tiny_lesson.yaml"  # draws its own data; see tools/teach_tiny.py


def named_weights(config: Any, load: str | None = None) -> list[str]:
    """The paths of weights that a configuration names: transformer, VAE and text encoders.

    Args:
        config: the OmegaConf node of a whole file. Missing keys give no path.
        load: the flag of that name, which wins over the file's key.
    """
    model = OmegaConf.select(config, "model")
    paths = [load or OmegaConf.select(config, "args.load")]
    if isinstance(model, Mapping):
        paths += [named.value for named in weight_paths(model)]
    return [path for path in paths if path and isinstance(path, str)]


def data_paths(config: Any, train_data: Sequence[str] | None = None) -> list[str]:
    """The paths of training data that a configuration names; the flag of that name wins."""
    paths = train_data or OmegaConf.select(config, "args.train_data") or []
    paths = [paths] if isinstance(paths, str) else paths
    is_list = isinstance(paths, list) or OmegaConf.is_list(paths)
    return [path for path in paths if path and isinstance(path, str)] if is_list else []


def choose_config(
    load: str | None = None, *, train: bool = False, train_data: Sequence[str] | None = None
) -> tuple[str, list[str]]:
    """The configuration to run, and the missing paths because of which it was chosen.

    A configuration that cannot be read is chosen too: the command that runs it reports the error.

    Args:
        load, train_data: the flags of these names.
        train: choose for training, which needs data too. The bundled model is trained on
            `train_data`, and if there is none, on the lesson, which draws its own data.

    Raises:
        ValueError: a path that a flag names does not exist.
    """
    for flag, given in (("--load", [load]), ("--train-data", train_data or [])):
        for path in given:
            if path and _is_missing(path):
                raise ValueError(f"{flag} {path} does not exist; check the path")
    full, bundled = FULL, BUNDLED
    if train:
        full, bundled = FULL_TRAIN, BUNDLED_TRAIN if train_data else LESSON
    try:
        config = OmegaConf.load(full)
        paths = named_weights(config, load) + (data_paths(config, train_data) if train else [])
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException):
        return full, []
    missing = [path for path in paths if _is_missing(path)]
    return (bundled if missing else full), missing


def _is_missing(path: str) -> bool:
    return not Path(path).expanduser().exists()


def main() -> None:
    """Print the choice, and on stderr the reason if it is not the 2B model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--load", nargs="?")
    parser.add_argument("--train-data", "--train_data", nargs="*")
    flags, _ = parser.parse_known_args()
    try:
        config, missing = choose_config(flags.load, train=flags.train, train_data=flags.train_data)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if missing:
        full, what = (FULL_TRAIN, "weights or data") if flags.train else (FULL, "weights")
        instead = "A lesson for the bundled model" if config == LESSON else "The bundled model"
        print(
            f"{full} names {what} that do not exist: {', '.join(missing)}. How to get the "
            f"weights: 'Getting the 2B weights' in README.md. {instead} instead, with {config}",
            file=sys.stderr,
        )
    print(config)


if __name__ == "__main__":
    main()
