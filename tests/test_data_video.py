"""Training clips from a folder: which are used, which frames they give, and what they look like."""

import logging
import os
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from data_video import SFTDataset
from sgm import clips
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from tools.tiny.draw_clips import write_clips
from tools.tiny.shapes import ShapeClips

HEIGHT, WIDTH = 64, 96
STEP = 15  # gray levels between two digits of a frame's number: far more than H.264 changes


def ffmpeg(*arguments, stdin=b""):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, input=stdin, check=True)


def write_clip(path, frames, rate=8):
    """Frames (t, h, w, 3), uint8, as H.264 at an exact rate, with their caption in labels/."""
    t, height, width, _ = frames.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate]
    ffmpeg(*source, "-i", "-", "-qp", "4", "-pix_fmt", "yuv420p", path, stdin=frames.tobytes())
    write_label(path, f"caption of {path.stem}")
    return path


def write_label(path, text):
    label = path.parents[1] / "labels" / f"{path.stem}.txt"
    label.parent.mkdir(exist_ok=True)
    label.write_text(text, "utf-8")


def numbered(count):
    """Frames that show their number: its last digit to base 16 left, the one before right."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    for number in range(count):
        frames[number, :, : WIDTH // 2] = number % 16 * STEP
        frames[number, :, WIDTH // 2 :] = number // 16 * STEP
    return frames


def numbers(video):
    """What `numbered` frames show, read from the middle of each half."""
    levels = (video.mean(dim=(1, 2)) + 1) * 127.5 / STEP  # (t, w)
    left, right = levels[:, WIDTH // 4].round(), levels[:, 3 * WIDTH // 4].round()
    return (left + 16 * right).int().tolist()


def dataset(folder, **params):
    defaults = {"video_size": [HEIGHT, WIDTH], "fps": 8, "max_num_frames": 49, "skip_frms_num": 0}
    return SFTDataset(folder, **(defaults | params))


def damage(path):
    """Overwrite the later pictures of an mp4 and leave its headers and the first one whole."""
    content = bytearray(path.read_bytes())
    first, end = content.find(b"mdat"), content.find(b"moov") - 4
    start = (first + end) // 2
    assert 0 < first < end
    content[start:end] = bytes(i * 37 % 256 for i in range(end - start))
    path.write_bytes(content)


def test_a_drawn_folder_gives_back_its_clips_and_captions(tmp_path):
    drawn = ShapeClips(2, seed=3)
    write_clips(drawn, tmp_path)
    params = {"video_size": [64, 96], "fps": 8, "max_num_frames": 17, "skip_frms_num": 0.0}
    config = {"target": "data_video.SFTDataset", "params": params}
    data = instantiate_from_config(config, data_dir=str(tmp_path))
    assert len(data) == 2
    for index in range(2):
        item = data[index]
        assert item["txt"] == drawn.caption(index)
        assert item["mp4"].shape == (17, 3, 64, 96) and item["mp4"].dtype == torch.float32
        assert -1 <= item["mp4"].min() < -0.5 < 0.5 < item["mp4"].max() <= 1
        # The chroma of yuv420p is coarse, so edges differ; a wrong frame or channel is far worse.
        assert (item["mp4"] - drawn[index]["mp4"]).abs().mean() < 0.03
    batch = default_collate([data[0], data[1]])
    assert batch["mp4"].shape == (2, 17, 3, 64, 96) and len(batch["txt"]) == 2


@pytest.mark.parametrize("rate", ["4", "24000/1001", "30000/1001", "30", "60"])
def test_frames_are_those_nearest_in_time(tmp_path, rate):
    per_second = float(eval(rate))
    total = round(2.4 * per_second)
    write_clip(tmp_path / "videos" / "clip.mp4", numbered(total), rate)
    shown = numbers(dataset(tmp_path, skip_frms_num=1)[0]["mp4"])
    assert len(shown) in (13, 17)
    offsets = np.array(shown) - 1  # from the first frame that is not dropped
    first = round(offsets[0] / per_second * 8)
    wanted = (first + np.arange(len(shown))) / 8
    # Half a frame of the clip, and what float32 timestamps are off by.
    assert np.abs(offsets / per_second - wanted).max() <= 0.5 / per_second + 1e-5


def test_frames_of_a_varying_rate_are_chosen_by_their_own_times():
    starts = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.1], dtype=torch.float64)
    assert clips.count_at_rate(starts, fps=4) == 5  # 0, 0.25, 0.5, 0.75, 1.0
    assert clips.nearest_frames(starts, torch.arange(5) / 4).tolist() == [0, 2, 2, 3, 3]


def test_frames_are_dropped_at_both_ends(tmp_path):
    write_clip(tmp_path / "videos" / "clip.mp4", numbered(19))
    shown = numbers(dataset(tmp_path, skip_frms_num=3.0)[0]["mp4"])
    assert shown == list(range(3, 16))


@pytest.mark.parametrize(("count", "kept"), [(17, 17), (16, 13), (9, 9), (5, 5)])
def test_shorter_clips_are_reduced_to_a_length_the_autoencoder_takes(tmp_path, count, kept):
    write_clip(tmp_path / "videos" / "clip.mp4", numbered(count))
    shown = numbers(dataset(tmp_path)[0]["mp4"])
    assert shown == list(range(shown[0], shown[0] + kept)) and shown[-1] < count


def test_longer_clips_are_cut_to_windows_that_vary_and_repeat_with_the_seed(tmp_path):
    write_clip(tmp_path / "videos" / "clip.mp4", numbered(60))
    data = dataset(tmp_path, max_num_frames=9, skip_frms_num=2)

    def windows(seed):
        torch.manual_seed(seed)
        return [numbers(data[0]["mp4"]) for _ in range(12)]

    found = windows(0)
    assert all(shown == list(range(shown[0], shown[0] + 9)) for shown in found)
    assert all(2 <= shown[0] and shown[-1] < 58 for shown in found)
    assert len({shown[0] for shown in found}) > 5
    assert windows(0) == found != windows(1)


@pytest.mark.parametrize(
    ("height", "width", "left", "right"),
    [
        (128, 384, 96, 288),  # twice as large, and wider: a quarter is cut off at either side
        (40, 60, 0, 60),  # smaller: all is kept
        (192, 96, 0, 96),  # higher: cut at top and bottom
    ],
)
def test_frames_are_scaled_to_cover_and_cropped_at_the_centre(tmp_path, height, width, left, right):
    ramp = np.linspace(0, 250, width).round().astype(np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (5, height, width, 3)).copy()
    if height > width:
        frames[:, : height // 3] = frames[:, -height // 3 :] = 255  # what must be cut off
    write_clip(tmp_path / "videos" / "clip.mp4", frames)
    video = dataset(tmp_path)[0]["mp4"]
    assert video.shape == (5, 3, HEIGHT, WIDTH)
    centres = left + (np.arange(WIDTH) + 0.5) * (right - left) / WIDTH - 0.5
    wanted = torch.tensor(np.interp(centres, np.arange(width), ramp)) / 127.5 - 1
    # Five gray levels: what H.264, the limited range and resampling at the border change.
    assert (video - wanted).abs().max() < 5 / 127.5


def test_clips_are_found_at_any_depth_under_any_name(tmp_path):
    folder = tmp_path / "my data"
    clip = write_clip(folder / "videos" / "first.mp4", numbered(5))
    names = ["set 1/videos/straße 中.MP4", "videos/a/b.c.mp4", "videos/x/videos/y.mp4"]
    labels = ["set 1/labels/straße 中.txt", "labels/a/b.c.txt", "videos/x/labels/y.txt"]
    for name, label in zip(names, labels, strict=True):
        for path in (folder / name, folder / label):
            path.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(clip.read_bytes())
        (folder / label).write_text(f"\ufeff  {name}\nsecond line\n\n", "utf-8")
    for ignored in ("other.mp4", "videos/._first.mp4", "videos/notes.txt"):
        (folder / ignored).write_bytes(b"no clip")
    data = dataset(folder)
    items = [data[index] for index in range(len(data))]
    assert {item["txt"] for item in items} == {
        "caption of first",
        *(f"{name}\nsecond line" for name in names),
    }


def test_a_linked_folder_is_followed(tmp_path):
    write_clip(tmp_path / "store" / "videos" / "clip.mp4", numbered(5))
    (tmp_path / "data").mkdir()
    for name in ("videos", "labels"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    assert dataset(tmp_path / "data")[0]["txt"] == "caption of clip"


def test_unusable_files_are_named_once_with_the_reason(tmp_path, caplog):
    videos = tmp_path / "videos"
    good = write_clip(videos / "good.mp4", numbered(12))
    write_clip(videos / "one frame.mp4", numbered(1))
    write_clip(videos / "only ends.mp4", numbered(6))
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", videos / "audio.mp4")
    (videos / "text.mp4").write_text("not a video\n" * 100)
    (videos / "half.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (videos / "empty.mp4").write_bytes(b"")
    for name in ("audio", "text", "half", "empty"):
        write_label(videos / f"{name}.mp4", "a caption")
    for name in ("no label", "no caption", "latin-1"):
        (videos / f"{name}.mp4").write_bytes(good.read_bytes())
    write_label(videos / "no caption.mp4", " \n")
    (tmp_path / "labels" / "latin-1.txt").write_bytes("Straße".encode("latin-1"))
    data = dataset(tmp_path, skip_frms_num=3)
    assert [path.name for path in data.clips] == ["good.mp4"]
    assert data[0]["txt"] == "caption of good"
    reasons = {
        "one frame": "too short: frames at 8 fps without 3 at each end: 0, needed: 5",
        "only ends": "too short",
        "audio": "no video stream",
        "text": "not a video",
        "half": "not a video, or only part",
        "empty": "it is empty",
        "no label": f"label {tmp_path}/labels/no label.txt does not exist",
        "no caption": "no caption.txt is empty",
        "latin-1": "cannot be read",
    }
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == len(reasons)
    for name, reason in reasons.items():
        named = [line for line in warnings if line.startswith(f"{videos}/{name}.mp4 is skipped: ")]
        assert len(named) == 1 and reason in named[0]


def test_a_file_that_crashes_the_decoder_costs_only_itself(tmp_path, caplog, monkeypatch):
    for name in ("a", "b", "c"):
        write_clip(tmp_path / "videos" / f"{name}.mp4", numbered(5))
    real = clips.open_clip
    # Runs in the child process, where it stands for std::terminate.
    monkeypatch.setattr(
        clips, "open_clip", lambda path: os._exit(134) if path.stem == "b" else real(path)
    )
    assert [path.stem for path in dataset(tmp_path).clips] == ["a", "c"]
    assert "b.mp4 is skipped: it makes the decoder crash" in caplog.text


def test_one_process_of_several_does_the_naming(tmp_path, caplog, monkeypatch):
    write_clip(tmp_path / "videos" / "good.mp4", numbered(5))
    (tmp_path / "videos" / "empty.mp4").write_bytes(b"")
    monkeypatch.setenv("RANK", "1")
    assert len(dataset(tmp_path)) == 1
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_the_next_clip_stands_in_for_one_that_turns_out_damaged(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in ("a", "b", "c"):
        write_clip(tmp_path / "videos" / f"{name}.mp4", noise)
    damage(tmp_path / "videos" / "c.mp4")
    data = dataset(tmp_path)
    assert len(data) == 3
    captions = [data[index]["txt"] for index in (0, 1, 2, 2)]
    assert captions == ["caption of a", "caption of b", "caption of a", "caption of a"]
    named = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert named == [f"{tmp_path}/videos/c.mp4 is skipped: its frames cannot be decoded"]

    (tmp_path / "videos" / "a.mp4").unlink()
    (tmp_path / "videos" / "b.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 clips can be decoded"):
        data[1]


def test_workers_tell_one_another_what_is_damaged(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in ("a", "b"):
        write_clip(tmp_path / "videos" / f"{name}.mp4", noise)
    damage(tmp_path / "videos" / "b.mp4")
    data = dataset(tmp_path)
    batches = list(DataLoader(data, batch_size=1, num_workers=2))
    assert [batch["txt"] for batch in batches] == [["caption of a"]] * 2
    # A worker found it, so this process does not name it again.
    assert data[1]["txt"] == "caption of a"
    assert "skipped" not in caplog.text


@pytest.mark.parametrize("place", ["absent", "without clips", "with bad clips only"])
def test_a_folder_without_usable_clips_is_an_error_that_says_the_layout(tmp_path, place):
    folder = tmp_path / place
    if place != "absent":
        (folder / "videos").mkdir(parents=True)
    if place == "with bad clips only":
        (folder / "videos" / "clip.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="videos/NAME.mp4 .* labels/NAME.txt") as failure:
        dataset(folder)
    assert str(folder) in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"video_size": 480},
        {"video_size": [480]},
        {"video_size": [480, 0]},
        {"fps": 0},
        {"fps": "8"},
        {"max_num_frames": 48},
        {"max_num_frames": -3},
        {"skip_frms_num": -1},
        {"skip_frms_num": 2.5},
    ],
)
def test_wrong_parameters_are_named(tmp_path, wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
        dataset(tmp_path, **wrong)
