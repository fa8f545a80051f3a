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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.config import SamplingArgs, TrainingArgs, load_config
from sgm.errors import UserError
from sgm.files import exists
from sgm.preflight import weight_paths

FULL = "configs/cogvideox_2b_infer.yaml"
BUNDLED = "configs/cogvideox_tiny_infer.yaml"
FULL_TRAIN = "configs/cogvideox_2b_sft.yaml"
BUNDLED_TRAIN = "configs/cogvideox_tiny_sft.yaml"
LESSON = "configs/cogvideox_tiny_lesson.yaml"  # draws its own data; see tools/teach_tiny.py


def named_paths(file: str, flags: Mapping[str, object], *, train: bool = False) -> list[str]:
    """The paths of weights, and for training of data, that a configuration names.

    Args:
        file: the configuration.
        flags: the flags by name, which win over its keys.
        train: whether it is run for training.

    Raises:
        UserError: the file cannot be used.
    """
    config = load_config(TrainingArgs if train else SamplingArgs, [file], flags)
    paths = [config.args.load, *(named.value for named in weight_paths(config.model))]
    if isinstance(config.args, TrainingArgs):
        paths += config.args.train_data
    return [path for path in paths if path and isinstance(path, str)]


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
            if path and not exists(path):
                raise ValueError(f"{flag} {path} does not exist; check the path")
    full, bundled = FULL, BUNDLED
    if train:
        full, bundled = FULL_TRAIN, BUNDLED_TRAIN if train_data else LESSON
    flags = {"load": load, "train_data": train_data}
    try:
        paths = named_paths(full, {k: v for k, v in flags.items() if v}, train=train)
    except UserError:
        return full, []
    missing = [path for path in paths if not exists(path)]
    return (bundled if missing else full), missing


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
