"""The sampling command where several processes make each video together."""

from __future__ import annotations

import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import sample_video
import sgm.engine
from arguments import parse_config
from sgm import CogVideoX
from sgm.cli import run_command
from sgm.config import SamplingArgs
from sgm.parallel.processes import LostProcessError
from sgm.preflight import check_sampling
from tests.parallel.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red circle moving left on a black background", "a blue square"]
OVERLAY = """
args: {sampling_num_frames: 3, parallel: video, device: cpu}
model: {sampler_config: {params: {num_steps: 3}}}
"""


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(ROOT)  # the bundled configuration's paths
    (tmp_path / "overlay.yaml").write_text(OVERLAY)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    base = ["--base", "configs/cogvideox_tiny_infer.yaml", str(tmp_path / "overlay.yaml")]
    return [*base, "--input-file", str(tmp_path / "prompts.txt")]


def make(rank: int, argv: list[str]) -> int:
    return sample_video.main(argv)


def sheets(folder: Path) -> list[np.ndarray]:
    """Return the contact sheets: frames without the codec, which would amplify differences."""
    return [iio.imread(path).astype(int) for path in sorted(folder.rglob("*.png"))]


def test_two_processes_make_the_videos_of_one_and_the_first_writes_them(
    argv: list[str], tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_command(lambda: sample_video.main([*argv, "--output-dir", str(alone)])) == 0
    command = [*argv, "--output-dir", str(together)]
    assert run_ranks(make, 2, command, log=tmp_path / "log") == [0, 0]
    assert sum(len(files) for _, _, files in os.walk(together)) == 2 * 3
    assert "000000.mp4" not in (tmp_path / "log1").read_text()  # not written a second time
    assert (
        "num_steps is 30 in guider_config but 3 in the sampler" in (tmp_path / "log0").read_text()
    )
    for found, expected in zip(sheets(together), sheets(alone), strict=True):
        # One sample in a pass instead of two changes sums in the last digits: rounding to 8 bits.
        assert np.abs(found - expected).max() <= 1


def fail_in_second_step(rank: int, argv: list[str]) -> int:
    if rank == 1:
        forward, calls = sgm.engine.NetworkWrapper.forward, []

        def broken(*inputs):
            calls.append(inputs)
            if len(calls) == 2:
                raise MemoryError("no memory is left")
            return forward(*inputs)

        sgm.engine.NetworkWrapper.forward = broken
    return sample_video.main(argv)


def test_a_process_that_fails_ends_the_run(argv: list[str], tmp_path: Path) -> None:
    command = [*argv, "--output-dir", str(tmp_path / "out")]
    assert run_ranks(fail_in_second_step, 2, command, log=tmp_path / "log") == [1, 1]
    said = (tmp_path / "log1").read_text()
    assert "error: process 1 failed, and the others cannot make videos without it: no mem" in said
    assert "prompt 1" not in said


def test_a_video_that_cannot_be_written_does_not_stop_the_others(
    argv: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f"0_{PROMPTS[0]}").write_text("a file where the folder should be")
    command = [*argv, "--output-dir", str(out)]
    assert run_ranks(make, 2, command, log=tmp_path / "log") == [1, 1]
    assert "error: prompt 0 failed" in (tmp_path / "log0").read_text()
    assert len(sheets(out)) == 1


def leave_a_video(rank: int, argv: list[str]) -> int:
    config = parse_config(SamplingArgs, "", argv)
    pipe = CogVideoX.load(config, check_sampling(config))
    steps = pipe.stream(PROMPTS[0])
    next(steps)
    steps.close()
    with pytest.raises(LostProcessError, match="this process abandoned a video"):
        pipe(PROMPTS[1])
    return 0


def test_a_process_that_leaves_a_video_makes_no_other(argv: list[str], tmp_path: Path) -> None:
    assert run_ranks(leave_a_video, 2, argv, log=tmp_path / "log") == [0, 0]
