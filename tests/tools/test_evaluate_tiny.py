"""The evaluation, on drawn clips instead of sampled ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgm.errors import UserError
from sgm.video import write_mp4
from tools import evaluate_tiny
from tools.tiny.shapes import draw_clip, held_out_combinations, parse_caption

CAPTIONS = [
    "a red circle moving left on a black background",
    "a blue square moving up on a white background",
    "a cyan triangle moving down on a gray background",
]


def write_videos(folder, shown, captions=CAPTIONS):
    """Videos that show `shown`, in the layout of sample_video.py, as if made from `captions`."""
    for line, (content, prompt) in enumerate(zip(shown, captions, strict=True)):
        place = folder / f"{line}_{prompt}" / "0"
        place.mkdir(parents=True)
        frames = draw_clip(parse_caption(content), np.random.default_rng(line))
        write_mp4([frames], place / "000000.mp4", fps=8)
        record = {"prompt": prompt, "line": line, "sample": 0}
        (place / "run.json").write_text(json.dumps(record), "utf-8")


def test_existing_videos_are_counted_attribute_by_attribute(tmp_path, capsys):
    shown = [CAPTIONS[0], "a blue circle moving up on a white background", CAPTIONS[2]]
    write_videos(tmp_path / "videos", shown)
    flags = ["--videos", tmp_path / "videos", "--output-dir", tmp_path / "out", "--psnr-clips", 0]
    assert evaluate_tiny.main([str(flag) for flag in flags]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:6] == [
        "3 videos",
        "color 3 of 3 100.0%",
        "shape 2 of 3 66.7%",
        "direction 3 of 3 100.0%",
        "background 3 of 3 100.0%",
        "all four 2 of 3 66.7%",
    ]
    assert lines[6] == f"wrong: {CAPTIONS[1]}: shape circle"
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width > 4 * 4 * 96


def test_rendering_goes_through_sample_video_with_its_flags(tmp_path, monkeypatch, capsys):
    calls = []

    def sample(argv):
        calls.append(argv)
        write_videos(tmp_path / "out" / "videos", CAPTIONS)
        return 0

    monkeypatch.setattr(evaluate_tiny.sample_video, "main", sample)
    flags = ["--base", "x.yaml", "--output-dir", str(tmp_path / "out"), "--psnr-clips", "0"]
    assert evaluate_tiny.main([*flags, "--seed", "7"]) == 0
    (argv,) = calls
    captions = Path(argv[argv.index("--input-file") + 1]).read_text().splitlines()
    specs = [parse_caption(caption) for caption in captions]
    assert len(set(captions)) == 88 and set(specs) == set(held_out_combinations())
    assert argv[:2] == ["--base", "x.yaml"] and argv[-2:] == ["--seed", "7"]
    assert "all four      3 of 3  100.0%" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        evaluate_tiny.main(flags)
    assert len(calls) == 1


def test_a_sheet_that_is_not_a_picture_is_refused_before_rendering(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_tiny, "render", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match="--sheet: 'sheet' must end with .png or .jpg"):
        evaluate_tiny.main(["--output-dir", str(tmp_path), "--sheet", "sheet"])


def test_failed_rendering_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_tiny.sample_video, "main", lambda argv: 1)
    with pytest.raises(UserError, match="prompts failed"):
        evaluate_tiny.main(["--output-dir", str(tmp_path)])


def test_folder_without_videos_and_other_prompts_are_refused(tmp_path):
    flags = ["--output-dir", str(tmp_path / "out"), "--psnr-clips", "0"]
    with pytest.raises(UserError, match=r"no run\.json"):
        evaluate_tiny.main(["--videos", str(tmp_path), *flags])
    write_videos(tmp_path / "videos", CAPTIONS[:1], captions=["a panda plays the guitar"])
    with pytest.raises(UserError, match="cannot be measured: caption 'a panda"):
        evaluate_tiny.main(["--videos", str(tmp_path / "videos"), *flags])


def test_flags_of_sampling_make_no_sense_with_existing_videos(tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        evaluate_tiny.main(["--videos", str(tmp_path), "--seed", "1"])
    assert exit_info.value.code == 2
