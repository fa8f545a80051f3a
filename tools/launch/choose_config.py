"""Print the configuration that inference.sh or finetune.sh uses if the user names none.

    python tools/launch/choose_config.py [flags of sample_video.py]
    python tools/launch/choose_config.py --train [flags of train_video.py]

The configuration of the 2B model is chosen if the weights (and training data) that it names exist.
Otherwise a configuration of the bundled model is chosen, and stderr lists the missing paths. Run
this in the repository, because the paths are relative. A path that a flag names must exist.
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
    """Return the paths of weights (and of data, for training) that a configuration names.

    Args:
        file: path of the configuration.
        flags: values of flags by name; they override the keys in the file.
        train: whether the configuration is for training.

    Raises:
        UserError: the configuration cannot be read or is invalid.
    """
    config = load_config(TrainingArgs if train else SamplingArgs, [file], flags)
    paths = [config.args.load, *(named.value for named in weight_paths(config.model))]
    if isinstance(config.args, TrainingArgs):
        paths += config.args.train_data
    return [path for path in paths if path and isinstance(path, str)]


def choose_config(
    load: str | None = None, *, train: bool = False, train_data: Sequence[str] | None = None
) -> tuple[str, list[str]]:
    """Return the configuration to run, and the missing paths that ruled out the 2B model.

    If the 2B configuration cannot be read, it is returned all the same, because the command that
    runs it reports the error.

    Args:
        load, train_data: the values of ``--load`` and ``--train-data``.
        train: choose for training, which needs data too. The bundled model trains on `train_data`;
            without `train_data` it trains on the lesson, which draws its own data.

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
    """Print the chosen configuration; if it is not the 2B model's, print the reason to stderr."""
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
            f"{full} names {what} that do not exist: {', '.join(missing)}. See 'Getting the 2B "
            f"weights' in README.md. {instead} runs instead, with {config}",
            file=sys.stderr,
        )
    print(config)


if __name__ == "__main__":
    main()
