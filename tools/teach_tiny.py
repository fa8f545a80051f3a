"""Teach CogVideoX-tiny a new subject, and compare videos before and after.

    python tools/teach_tiny.py [--prompts N] [flags of train_video.py]

This draws a small dataset and trains a LoRA on it. Then it renders prompts that name the subject,
once without and once with the LoRA. It measures what the videos show, and prints the next commands
to try. `bash finetune.sh` runs this if the 2B model's weights or data are missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_video
from arguments import parse_config
from sgm.cli import run_and_exit, set_up_logging
from sgm.config import TrainingArgs
from sgm.files import make_output_folder, replacing
from tools.tiny.lesson import SUBJECT, draw_dataset, parse_prompt, prompts

logger = logging.getLogger(__name__)

CONFIGS = [f"configs/cogvideox_tiny_{part}.yaml" for part in ("sft", "lora", "lesson")]
SAMPLING_CONFIGS = ["configs/cogvideox_tiny_infer.yaml"]
DATA = Path("tiny_lesson")  # must match the configuration


def prepare_data(args: TrainingArgs) -> None:
    """Draw the dataset if the run uses it and it does not exist yet.

    Raises:
        UserError: a file cannot be written.
    """
    folders = [Path(folder) for folder in (*args.train_data, *args.valid_data)]
    if any(folder.parent == DATA for folder in folders) and not DATA.exists():
        logger.info("drawing clips of a %s and of known subjects into folder %s", SUBJECT, DATA)
        draw_dataset(DATA)


def validation_losses(run: Path) -> list[float]:
    """Return the validation losses of a run in order; the first is measured before training."""
    from sgm.training.report import METRICS_FILE

    lines = (run / METRICS_FILE).read_text("utf-8").splitlines()
    return [line["valid/loss"] for line in map(json.loads, lines) if "valid/loss" in line]


def compare(run: Path, *, num_prompts: int, device: str) -> str:
    """Render the prompts without and with the LoRA of `run`, and measure the videos.

    The videos are written to a new folder in `run`.

    Returns:
        The results and the next commands to try, as text.

    Raises:
        UserError: rendering failed, or a file cannot be written.
    """
    from tools.evaluate_tiny import draw_sheet, read_videos, render

    folder = make_output_folder(run / f"before-after-{time.strftime('%m-%d-%H-%M-%S')}")
    prompt_file = folder / "prompts.txt"
    captions = prompts()[:num_prompts]
    prompt_file.write_text("\n".join(captions) + "\n", encoding="utf-8")
    videos, counts = {}, {}
    for name, lora in (("before", []), ("after", ["--lora", str(run)])):
        render(SAMPLING_CONFIGS, prompt_file, folder / name, ["--device", device, *lora])
        videos[name] = read_videos(folder / name, parse=parse_prompt)
        counts[name] = sum(not {"color", "shape"} & video.errors.keys() for video in videos[name])
    before, after = videos["before"], videos["after"]
    pairs = [video for pair in zip(before, after, strict=True) for video in pair]
    sheet = folder / "before_after.png"
    with replacing(sheet) as partial:
        draw_sheet(pairs, columns=2).save(partial)
    right = sum(not video.errors for video in after)
    return (
        f"a {SUBJECT} is recognised in {counts['after']} of {len(after)} videos (before training: "
        f"{counts['before']}); {right} also match the direction and background in the prompt\n"
        f"image with videos before (left) and after (right): {sheet}\n"
        f"to make other videos:\n"
        f"  echo '{captions[0]}' > prompts.txt\n"
        f"  bash inference.sh {SAMPLING_CONFIGS[0]} --lora {run} --input-file prompts.txt\n"
        f"to test whether the model still draws what it knew before:\n"
        f"  python tools/evaluate_tiny.py --lora {run} --output-dir {folder / 'known'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the dataset, train on it, and compare videos before and after."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompts", type=int, default=len(prompts()), choices=range(1, 17))
    options, flags = parser.parse_known_args(argv)  # all other flags are for train_video.py
    args = parse_config(TrainingArgs, __doc__, ["--base", *CONFIGS, *flags]).args
    set_up_logging()
    started = time.monotonic()
    prepare_data(args)
    train_video.main(["--base", *CONFIGS, *flags])
    from sgm.training.run_folder import find_checkpoint

    run = find_checkpoint(args.model_copy(update={"resume": args.resume or "latest"})).parent
    found = compare(run, num_prompts=options.prompts, device=args.device)
    losses = validation_losses(run)
    if len(losses) > 1:
        fall = 1 - losses[-1] / losses[0]
        print(f"validation loss {losses[-1]:.4f}, before {losses[0]:.4f} ({fall:.0%} lower)")
    print(found)
    print(f"total time: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
