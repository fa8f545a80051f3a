"""Measure how well CogVideoX-tiny follows its captions.

    python tools/evaluate_tiny.py [--device cuda …]
    python tools/evaluate_tiny.py --lora ckpts/tiny-lesson-… --output-dir outputs/known
    python tools/evaluate_tiny.py --videos outputs

The captions are the 44 combinations that training never saw, in two wordings each. This renders
them with sample_video.py, and measures colour, shape, direction and background in each mp4. It also
measures the PSNR of the autoencoder on new clips. Other flags are passed to sample_video.py. With
--lora, the result shows whether a fine-tuned model still draws what it knew before. With --videos,
existing mp4s are measured instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw

import sample_video
from sgm.cli import run_and_exit
from sgm.errors import UserError
from sgm.files import make_output_folder, refuse_existing, replacing
from sgm.video import prepare_sheet
from tools.tiny.measure import ATTRIBUTES, Measurement, measure
from tools.tiny.shapes import ShapeSpec, held_out_combinations, parse_caption
from tools.tiny.train_vae import CONFIG, load_autoencoder, reconstruct_fresh

SHEET_COLUMNS, SHEET_FRAMES, LABEL_HEIGHT, GAP, FRAME_GAP = 4, 4, 14, 6, 2


@dataclass(frozen=True)
class MeasuredVideo:
    """A video, the attributes in its caption and the measured attributes."""

    spec: ShapeSpec
    frames: np.ndarray  # uint8 (t, h, w, 3)
    measurement: Measurement

    @property
    def errors(self) -> dict[str, str]:
        """The measured value of each attribute that differs from the caption."""
        matches = self.measurement.matches(self.spec)
        wrong = [name for name in ATTRIBUTES if not matches[name]]
        return {name: getattr(self.measurement, name) or "unclear" for name in wrong}

    def describe_errors(self) -> str:
        """Return `errors` as text; empty if the video matches its caption."""
        return ", ".join(f"{name} {value}" for name, value in self.errors.items())


def render(base: Sequence[str], prompts: Path, folder: Path, flags: Sequence[str]) -> None:
    """Render the prompts of a file into `folder` with sample_video.py.

    Args:
        base: configuration files.
        prompts: a file with one prompt per line.
        folder: the output folder, which must not exist.
        flags: more flags for sample_video.py.

    Raises:
        UserError: the folder exists, or a prompt failed.
    """
    refuse_existing(folder)  # old videos in it would be measured too
    paths = ["--input-type", "txt", "--input-file", str(prompts), "--output-dir", str(folder)]
    if sample_video.main(["--base", *base, *paths, *flags]):
        raise UserError("some prompts failed (see above); no video was measured")


def read_videos(
    folder: Path, *, parse: Callable[[str], ShapeSpec] = parse_caption
) -> list[MeasuredVideo]:
    """Measure each video that sample_video.py wrote under `folder`, in the order of prompts.

    Args:
        folder: the output folder of sample_video.py.
        parse: returns the attributes in a prompt; raises ValueError if the prompt is invalid.

    Raises:
        UserError: there are no videos, one cannot be read, or a prompt is not a caption of the toy
            world.
    """
    import imageio.v3 as iio

    records = [(path, json.loads(path.read_text("utf-8"))) for path in folder.rglob("run.json")]
    if not records:
        raise UserError(f"{folder} contains no videos of sample_video.py; no run.json was found")
    videos = []
    for path, record in sorted(records, key=lambda item: (item[1]["line"], item[1]["sample"])):
        video = path.with_name("000000.mp4")
        try:
            spec = parse(record["prompt"])
            frames = iio.imread(video, plugin="FFMPEG")
            videos.append(MeasuredVideo(spec, frames, measure(frames)))
        except (OSError, ValueError) as error:
            raise UserError(f"{video} cannot be measured: {error}") from None
    return videos


def report(videos: Sequence[MeasuredVideo]) -> None:
    """Print the accuracy of each attribute and of all four together, then list the wrong videos."""
    print(f"{len(videos)} videos")
    counts = {name: sum(name not in video.errors for video in videos) for name in ATTRIBUTES}
    counts["all four"] = sum(not video.errors for video in videos)
    for name, count in counts.items():
        print(f"{name:<11}{count:>4} of {len(videos)}{count / len(videos):>8.1%}")
    for video in videos:
        if video.errors:
            print(f"wrong: {video.spec.caption()}: {video.describe_errors()}")


def draw_sheet(videos: Sequence[MeasuredVideo], *, columns: int = SHEET_COLUMNS) -> Image.Image:
    """Return an image that shows a few frames of each video; labels of wrong videos are red."""
    _, height, width, _ = videos[0].frames.shape
    frame_step = width + FRAME_GAP
    cell_width, cell_height = SHEET_FRAMES * frame_step + GAP, height + LABEL_HEIGHT + GAP
    num_rows = -(-len(videos) // columns)
    sheet = Image.new("RGB", (columns * cell_width, num_rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, video in enumerate(videos):
        row, column = divmod(index, columns)
        left, top = column * cell_width, row * cell_height
        errors = video.describe_errors()
        label = " ".join(video.spec.combination) + (f"  [{errors}]" if errors else "")
        draw.text((left + 2, top + 1), label, fill="red" if errors else "black")
        times = np.linspace(0, len(video.frames) - 1, SHEET_FRAMES).round().astype(int)
        for place, frame in enumerate(video.frames[times]):
            sheet.paste(Image.fromarray(frame), (left + place * frame_step, top + LABEL_HEIGHT))
    return sheet


def fidelity(base: Sequence[str], num_clips: int) -> torch.Tensor:
    """Return the PSNR in dB of new clips that the autoencoder reconstructs, (num_clips,).

    Raises:
        UserError: the autoencoder cannot be built or loaded.
    """
    return reconstruct_fresh(load_autoencoder(*base), num_clips)[0]


def parse_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command, and the other flags, which are for sample_video.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", default=[CONFIG], metavar="YAML")
    parser.add_argument(
        "--prompts", type=Path, help="captions, one per line; default: held-out combinations"
    )
    parser.add_argument(
        "--videos", type=Path, help="measure the videos in this output folder of sample_video.py"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/evaluate_tiny"))
    parser.add_argument("--sheet", type=Path, help="default: contact_sheet.png in --output-dir")
    parser.add_argument(
        "--psnr-clips", type=int, default=32, help="clips for the autoencoder's PSNR; 0 skips it"
    )
    options, flags = parser.parse_known_args(argv)
    if options.videos and flags:
        parser.error(f"{flags[0]} is a flag of sample_video.py, which does not run with --videos")
    return options, flags


def main(argv: Sequence[str] | None = None) -> int:
    """Render the captions unless --videos is given, then measure and report."""
    options, flags = parse_options(argv)
    folder = options.videos
    output = make_output_folder(options.output_dir)
    sheet = options.sheet or output / "contact_sheet.png"
    prepare_sheet(sheet, option="--sheet")
    if folder is None:
        folder, prompts = output / "videos", options.prompts
        if prompts is None:
            prompts = output / "captions.txt"
            captions = [spec.caption(n) for n in (0, 1) for spec in held_out_combinations()]
            prompts.write_text("\n".join(captions) + "\n", encoding="utf-8")
        render(options.base, prompts, folder, flags)
    videos = read_videos(folder)
    report(videos)
    with replacing(sheet) as partial:
        draw_sheet(videos).save(partial)
    print(f"contact sheet: {sheet}")
    if options.psnr_clips:
        values = fidelity(options.base, options.psnr_clips)
        print(
            f"autoencoder, {len(values)} new clips: mean PSNR {float(values.mean()):.2f} dB, "
            f"minimum {float(values.min()):.2f} dB"
        )
    return 0


if __name__ == "__main__":
    run_and_exit(main)
