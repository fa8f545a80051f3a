"""How well CogVideoX-tiny does what its captions say.

    python tools/evaluate_tiny.py [--device cuda …]
    python tools/evaluate_tiny.py --lora ckpts/tiny-lesson-… --output-dir outputs/known
    python tools/evaluate_tiny.py --videos outputs

Renders the 44 combinations that training never saw, in two wordings each, with sample_video.py,
measures colour, shape, direction and background in each mp4, and the fidelity of the autoencoder on
fresh clips. Flags that are not listed here go to sample_video.py: with --lora it tells whether a
fine-tuned model still draws what it knew. With --videos, mp4s that exist are measured instead.
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
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

import sample_video
from sgm.cli import run_and_exit
from sgm.errors import UserError
from sgm.files import make_output_folder, replacing
from sgm.util import instantiate_from_config
from tools.tiny.measure import ATTRIBUTES, Measurement, measure
from tools.tiny.shapes import ShapeSpec, held_out_combinations, parse_caption
from tools.tiny.train_vae import CONFIG, fresh_clips, reconstruct

PSNR_BATCH = 8
SHEET_COLUMNS, SHEET_FRAMES, LABEL_HEIGHT, GAP, FRAME_GAP = 4, 4, 14, 6, 2


@dataclass(frozen=True)
class Result:
    """A video, what its caption says and what was measured."""

    spec: ShapeSpec
    frames: np.ndarray  # uint8 (t, h, w, 3)
    measurement: Measurement

    @property
    def is_right(self) -> bool:
        """Whether all four attributes are those of the caption."""
        return all(self.measurement.matches(self.spec).values())


def write_captions(path: Path) -> Path:
    """Write the held-out combinations in the first two wordings, one a line; returns `path`."""
    captions = [spec.caption(wording) for wording in (0, 1) for spec in held_out_combinations()]
    make_output_folder(path.parent)
    path.write_text("\n".join(captions) + "\n", encoding="utf-8")
    return path


def render(base: Sequence[str], prompts: Path, folder: Path, flags: Sequence[str]) -> None:
    """Make the videos of a prompt file with sample_video.py.

    Raises:
        UserError: the folder holds something, or a prompt failed.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder} is not empty, and its videos would be counted with the new ones; "
            "remove it, choose another --output-dir, or measure it with --videos"
        )
    paths = ["--input-type", "txt", "--input-file", str(prompts), "--output-dir", str(folder)]
    if sample_video.main(["--base", *base, *paths, *flags]):
        raise UserError("some prompts failed (see above), so nothing is measured")


def read_results(
    folder: Path, *, parse: Callable[[str], ShapeSpec] = parse_caption
) -> list[Result]:
    """Measure every video that sample_video.py wrote under `folder`, in the order of prompts.

    Args:
        parse: tells what a prompt asks for; ValueError where it does not understand it.

    Raises:
        UserError: there is none, one cannot be read, or a prompt is not a caption of the toy world.
    """
    import imageio.v3 as iio

    records = [(path, json.loads(path.read_text("utf-8"))) for path in folder.rglob("run.json")]
    if not records:
        raise UserError(f"{folder} holds no videos of sample_video.py (no run.json was found)")
    results = []
    for path, record in sorted(records, key=lambda item: (item[1]["line"], item[1]["sample"])):
        video = path.with_name("000000.mp4")
        try:
            spec = parse(record["prompt"])
            frames = iio.imread(video, plugin="FFMPEG")
            results.append(Result(spec, frames, measure(frames)))
        except (OSError, ValueError) as error:
            raise UserError(f"{video} cannot be measured: {error}") from None
    return results


def report(results: Sequence[Result]) -> None:
    """Print the accuracy of each attribute and of all four together, then what went wrong."""
    print(f"{len(results)} videos")
    hits = [result.measurement.matches(result.spec) for result in results]
    counts = {name: sum(hit[name] for hit in hits) for name in ATTRIBUTES}
    counts["all four"] = sum(result.is_right for result in results)
    for name, count in counts.items():
        print(f"{name:<11}{count:>4} of {len(results)}{count / len(results):>8.1%}")
    for result in results:
        if not result.is_right:
            print(f"wrong: {result.spec.caption()}: {describe_errors(result)}")


def describe_errors(result: Result) -> str:
    """What was measured instead, for each wrong attribute."""
    matches = result.measurement.matches(result.spec)
    wrong = [name for name in ATTRIBUTES if not matches[name]]
    found = {name: getattr(result.measurement, name) or "unclear" for name in wrong}
    return ", ".join(f"{name} {value}" for name, value in found.items())


def draw_sheet(results: Sequence[Result], *, columns: int = SHEET_COLUMNS) -> Image.Image:
    """All videos in a grid, a few frames of each in a row; captions of wrong ones are in red."""
    _, height, width, _ = results[0].frames.shape
    frame_step = width + FRAME_GAP
    cell_width, cell_height = SHEET_FRAMES * frame_step + GAP, height + LABEL_HEIGHT + GAP
    num_rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (columns * cell_width, num_rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, result in enumerate(results):
        left = index % columns * cell_width
        top = index // columns * cell_height
        label = " ".join(result.spec.combination)
        if not result.is_right:
            label += f"  [{describe_errors(result)}]"
        draw.text((left + 2, top + 1), label, fill="black" if result.is_right else "red")
        times = np.linspace(0, len(result.frames) - 1, SHEET_FRAMES).round().astype(int)
        for place, frame in enumerate(result.frames[times]):
            sheet.paste(Image.fromarray(frame), (left + place * frame_step, top + LABEL_HEIGHT))
    return sheet


def fidelity(base: Sequence[str], num_clips: int) -> torch.Tensor:
    """PSNR in dB of fresh clips through the configuration's autoencoder, (num_clips,).

    Raises:
        UserError: the autoencoder cannot be built or loaded.
    """
    config = OmegaConf.merge(*(OmegaConf.load(path) for path in base))
    vae = instantiate_from_config(config.model.first_stage_config).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae.to(device)
    clips = fresh_clips(num_clips, device).split(PSNR_BATCH)
    return torch.cat([reconstruct(vae, part)[0] for part in clips])


def parse_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it is meant for sample_video.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", default=[CONFIG], metavar="YAML")
    parser.add_argument("--prompts", type=Path, help="captions, one a line")
    parser.add_argument("--videos", type=Path, help="measure these, which sample_video.py wrote")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/evaluate_tiny"))
    parser.add_argument("--sheet", type=Path, help="default: contact_sheet.png in --output-dir")
    parser.add_argument("--psnr-clips", type=int, default=32, help="0 leaves the autoencoder out")
    options, flags = parser.parse_known_args(argv)
    if options.videos and flags:
        parser.error(f"{flags[0]} is for sample_video.py, which --videos does not run")
    return options, flags


def main(argv: Sequence[str] | None = None) -> int:
    """Render unless there are videos, measure, report."""
    options, flags = parse_options(argv)
    folder = options.videos
    if folder is None:
        folder = options.output_dir / "videos"
        prompts = options.prompts or write_captions(options.output_dir / "captions.txt")
        render(options.base, prompts, folder, flags)
    sheet_path = options.sheet or make_output_folder(options.output_dir) / "contact_sheet.png"
    results = read_results(folder)
    report(results)
    with replacing(sheet_path) as partial:
        draw_sheet(results).save(partial)
    print(f"contact sheet: {sheet_path}")
    if options.psnr_clips:
        values = fidelity(options.base, options.psnr_clips)
        print(
            f"autoencoder, {len(values)} fresh clips: PSNR {float(values.mean()):.2f} dB on "
            f"average, {float(values.min()):.2f} dB at least"
        )
    return 0


if __name__ == "__main__":
    run_and_exit(main)
