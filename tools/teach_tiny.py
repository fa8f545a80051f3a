"""Teach CogVideoX-tiny a subject that it has never heard of, and show before and after.

    python tools/teach_tiny.py [--prompts N] [flags of train_video.py]

Draws a small dataset, trains LoRA matrices on it, renders prompts that name the subject without
and with them, measures what the videos show, and says how to go on. `bash finetune.sh` runs this
where the 2B model's weights or data are absent.
"""

from __future__ import annotations

import argparse
import logging
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_video
from arguments import parse_config
from sgm.cli import run_and_exit, set_up_logging
from sgm.config import TrainingArgs
from sgm.files import make_output_folder, replacing
from tools.tiny.lesson import COLOR, SHAPE, SUBJECT, draw_dataset, parse_prompt, prompts

logger = logging.getLogger(__name__)

CONFIGS = [f"configs/cogvideox_tiny_{part}.yaml" for part in ("sft", "lora", "lesson")]
SAMPLING_CONFIGS = ["configs/cogvideox_tiny_infer.yaml"]
DATA = Path("tiny_lesson")  # as the configuration names it


def prepare_data(args: TrainingArgs) -> None:
    """Draw the dataset where the run is to read it and it is not there yet.

    Raises:
        UserError: a file cannot be written.
    """
    folders = [Path(folder) for folder in (*args.train_data, *args.valid_data)]
    if any(folder.parent == DATA for folder in folders) and not DATA.exists():
        logger.info("drawing clips of a %s, and of what the model knows, in %s", SUBJECT, DATA)
        draw_dataset(DATA)


def newest_run(args: TrainingArgs) -> Path:
    """The folder of the run that was just trained."""
    from sgm.training.run_folder import find_checkpoint

    return find_checkpoint(args.model_copy(update={"resume": args.resume or "latest"})).parent


def validation_losses(run: Path) -> list[float]:
    """Those that a run kept for TensorBoard, in order; the first is from before training."""
    from tensorboardX.proto.event_pb2 import Event

    losses = []
    for path in sorted((run / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            # A record is its length in 8 bytes, 4 of checksum, itself, 4 of checksum.
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            losses += [v.simple_value for v in event.summary.value if v.tag == "valid/loss"]
            place += length + 16
    return losses


def render_and_measure(folder: Path, prompt_file: Path, flags: Sequence[str]) -> list[Any]:
    """Videos of the prompts under `folder`, and what each of them shows.

    Returns:
        `Result` of tools/evaluate_tiny.py for each prompt.

    Raises:
        UserError: rendering failed.
    """
    from tools.evaluate_tiny import read_results, render

    render(SAMPLING_CONFIGS, prompt_file, folder, flags)
    return read_results(folder, parse=parse_prompt)


def count_recognised(results: Sequence[Any]) -> int:
    """Videos in which the subject is recognised: its colour and its shape."""
    found = [(result.measurement.color, result.measurement.shape) for result in results]
    return found.count((COLOR, SHAPE))


def compare(run: Path, *, num_prompts: int, device: str) -> str:
    """Render the prompts before and after, into the run's folder; returns what was found.

    Raises:
        UserError: rendering failed, or a file cannot be written.
    """
    from tools.evaluate_tiny import draw_sheet

    folder = make_output_folder(run / f"before-after-{time.strftime('%m-%d-%H-%M-%S')}")
    prompt_file = folder / "prompts.txt"
    captions = prompts()[:num_prompts]
    prompt_file.write_text("\n".join(captions) + "\n", encoding="utf-8")
    flags = ["--device", device]
    before = render_and_measure(folder / "before", prompt_file, flags)
    after = render_and_measure(folder / "after", prompt_file, [*flags, "--lora", str(run)])
    pairs = [result for pair in zip(before, after, strict=True) for result in pair]
    sheet = folder / "before_after.png"
    with replacing(sheet) as partial:
        draw_sheet(pairs, columns=2).save(partial)
    right = sum(result.is_right for result in after)
    return (
        f"a {SUBJECT} is recognised in {count_recognised(after)} of {len(after)} videos, before in "
        f"{count_recognised(before)}; {right} also have the direction and background asked for\n"
        f"left before, right after: {sheet}\n"
        f"to make others:\n"
        f"  echo '{captions[0]}' > prompts.txt\n"
        f"  bash inference.sh {SAMPLING_CONFIGS[0]} --lora {run} --input-file prompts.txt\n"
        f"whether it still draws what it knew:\n"
        f"  python tools/evaluate_tiny.py --lora {run} --output-dir {folder / 'known'}"
    )


def parse_options(argv: Sequence[str] | None) -> tuple[int, list[str]]:
    """Number of prompts, and the flags that are meant for train_video.py."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompts", type=int, default=len(prompts()), choices=range(1, 17))
    options, flags = parser.parse_known_args(argv)
    return options.prompts, flags


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, train, compare."""
    num_prompts, flags = parse_options(argv)
    args = parse_config(TrainingArgs, __doc__, ["--base", *CONFIGS, *flags]).args
    set_up_logging()
    started = time.monotonic()
    prepare_data(args)
    train_video.main(["--base", *CONFIGS, *flags])
    run = newest_run(args)
    found = compare(run, num_prompts=num_prompts, device=args.device)
    losses = validation_losses(run)
    if len(losses) > 1:
        fall = 1 - losses[-1] / losses[0]
        print(f"validation loss {losses[-1]:.4f}, before {losses[0]:.4f} ({fall:.0%} less)")
    print(found)
    print(f"all of this took {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
