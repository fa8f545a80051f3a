"""A folder with clips of every kind, inspected by the command and read by the dataset."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image

from data_video import SFTDataset, main
from sgm.cli import run_command

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "cogvideox_tiny_sft.yaml"  # 64x96, 17 frames at 8 fps, none skipped
USABLE = {  # name, arguments of ffmpeg: frames, size, rate → frames at 8 fps and of an item
    "24p.mp4": ("-r", "24000/1001", "-t", "2.5", "60 frames of 128x96 at 23.98 fps", 20, 17),
    "30.mp4": ("-r", "30", "-t", "1", "30 frames of 128x96 at 30 fps", 8, 5),
    "60.mp4": ("-r", "60", "-t", "1.2", "72 frames of 128x96 at 60 fps", 10, 9),
    "portrait.mp4": ("-r", "8", "-t", "1", "-s", "90x160", "8 frames of 90x160 at 8 fps", 8, 5),
    "Straße am Fluß 中.mp4": ("-r", "8", "-t", "1", "8 frames of 128x96 at 8 fps", 8, 5),
    "varying.mp4": (
        *("-r", "30", "-t", "1", "-vf", "select='lt(n,8)+not(mod(n,3))'", "-fps_mode", "vfr"),
        *("15 frames of 128x96 at 15.56 fps", 8, 5),
    ),
}
SKIPPED = {
    "one frame.mp4": "it is too short: 1 frames at 8 fps; 5 are needed",
    "audio only.mp4": "it has no video stream",
    "corrupt.mp4": "it is not a video, or only part of a video file",
    "truncated.mp4": "it is not a video, or only part of a video file",
    "empty.mp4": "it is empty",
    "no caption.mp4": "does not exist",
}


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One clip of each kind, with captions in labels/."""
    folder = tmp_path_factory.mktemp("data") / "my clips"
    videos, labels = folder / "videos", folder / "labels"
    videos.mkdir(parents=True)
    labels.mkdir()
    for name, (_, rate, *rest) in USABLE.items():
        source = f"testsrc=size=128x96:rate={rate}"
        ffmpeg("-f", "lavfi", "-i", source, *rest[:-3], "-pix_fmt", "yuv420p", videos / name)
    whole = (videos / "24p.mp4").read_bytes()
    ffmpeg("-i", videos / "30.mp4", "-frames:v", 1, videos / "one frame.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", videos / "audio only.mp4")
    (videos / "corrupt.mp4").write_bytes(bytes(i * 37 % 256 for i in range(3000)))
    (videos / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "empty.mp4").write_bytes(b"")
    shutil.copy(videos / "30.mp4", videos / "no caption.mp4")
    for name in (*USABLE, *SKIPPED):
        if name != "no caption.mp4":
            (labels / name).with_suffix(".txt").write_text(f"A caption of {name}\n", "utf-8")
    return folder


def test_the_command_says_what_each_clip_gives(folder, tmp_path):
    command = [sys.executable, ROOT / "data_video.py", folder, "--base", CONFIG]
    before = sorted(folder.rglob("*"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    for name, (*_, facts, count, length) in USABLE.items():
        (line,) = [line for line in lines if line.startswith(f"videos/{name}: ")]
        windows = "1 window of" if count == length else f"{count - length + 1} windows of"
        assert (
            f" {facts}, " in line
            and f"; {count} frames at 8 fps; {windows} {length} frames;" in line
        )
        assert line.endswith(f"caption of {len(name.split()) + 3} words")
    for name, reason in SKIPPED.items():
        (line,) = [line for line in lines if line.startswith(f"videos/{name} is skipped: ")]
        assert reason in line
    assert "6 of 12 clips can be used: " in done.stdout
    assert "(4 with 5 frames, 1 with 9 frames, 1 with 17 frames)" in done.stdout
    sheet = tmp_path / "outputs" / "my clips-clips.png"
    assert lines[-1] == "outputs/my clips-clips.png shows the first 6 clips, one row per clip"
    assert Image.open(sheet).size == (6 * 96, 6 * 64)
    assert sorted(folder.rglob("*")) == before


def test_a_reader_that_stops_reading_ends_it_without_a_trace(folder, tmp_path):
    command = [sys.executable, ROOT / "data_video.py", folder, "--base", CONFIG]
    pipe, end = os.pipe()
    os.close(pipe)
    done = subprocess.run(command, cwd=tmp_path, stdout=end, stderr=subprocess.PIPE, text=True)
    os.close(end)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_dataset_gives_what_the_command_says(folder, caplog):
    data = SFTDataset(folder, [64, 96], fps=8, max_num_frames=17, skip_frms_num=0)
    assert {path.name for path in data.clips} == set(USABLE)
    for index, path in enumerate(data.clips):
        item = data[index]
        assert item["txt"] == f"A caption of {path.name}"
        assert item["mp4"].shape == (USABLE[path.name][-1], 3, 64, 96)
        assert item["mp4"].isfinite().all() and item["mp4"].std() > 0.3
    for name in SKIPPED:
        assert caplog.text.count(f"{name} is skipped: ") == 1


def test_a_folder_without_usable_clips_lists_them_and_fails_with_a_sentence(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("caption")
    command = [str(tmp_path), "--base", str(CONFIG), "--contact-sheet", str(tmp_path / "x.png")]
    assert run_command(lambda: main(command)) == 1
    said = capsys.readouterr()
    assert said.out.startswith("a.mp4 is skipped: it is empty\n")
    assert said.err.startswith("error: data folder ") and said.err.count("\n") == 1
    assert "none of its 1 clips can be used" in said.err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("data", "sheet", "named"),
    [
        (
            "{params: {fps: 8}}",
            "x.png",
            "data.target: None must be data_video.SFTDataset",
        ),
        ("{target: torch.nn.Identity}", "x.png", "must be data_video.SFTDataset"),
        (
            "{target: data_video.SFTDataset, params: {fps: 8}}",
            "x.png",
            "data: video_size is missing",
        ),
        ("{target: data_video.SFTDataset, params: {fqs: 8}}", "x.png", "did you mean 'fps'"),
        (None, "x.txt", "must end with .png or .jpg"),
    ],
)
def test_mistakes_are_named_before_the_clips_are_looked_at(tmp_path, data, sheet, named, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {data}" if data else CONFIG.read_text("utf-8"), "utf-8")
    command = [str(tmp_path), "--base", str(config), "--contact-sheet", str(tmp_path / sheet)]
    assert run_command(lambda: main(command)) == 1
    assert named in capsys.readouterr().err


def test_what_was_decoded_is_not_kept(folder):
    import gc

    import torch

    data = SFTDataset(folder, [64, 96], fps=8, max_num_frames=17, skip_frms_num=0)

    def tensors():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    data[0]
    before = tensors()
    for index in range(len(data)):
        data[index]
    assert tensors() == before
