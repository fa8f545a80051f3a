"""Training clips from a folder: which are used, their frames, and the pixels of these."""

import logging
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from data_video import SFTDataset
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
    _, height, width, _ = frames.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate]
    ffmpeg(*source, "-i", "-", "-qp", "4", "-pix_fmt", "yuv420p", path, stdin=frames.tobytes())
    write_label(path, f"caption of {path.stem}")
    return path


def write_label(path, text):
    label = path.parents[1] / "labels" / f"{path.stem}.txt"
    label.parent.mkdir(exist_ok=True)
    label.write_text(text, "utf-8")


def label_all(folder):
    for path in (folder / "videos").iterdir():
        write_label(path, f"caption of {path.stem}")


def numbered(count):
    """Frames that show their number: its last digit to base 16 left, the one before right."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    for number in range(count):
        frames[number, :, : WIDTH // 2] = number % 16 * STEP
        frames[number, :, WIDTH // 2 :] = number // 16 * STEP
    return frames


def numbers(video):
    """The numbers that `numbered` frames show, read from the middle of each half."""
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
    # Half a frame of the clip, and the error of float32 timestamps.
    assert np.abs(offsets / per_second - wanted).max() <= 0.5 / per_second + 1e-5


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
        return [numbers(data[0]["mp4"]) for _ in range(8)]

    found = windows(0)
    assert all(shown == list(range(shown[0], shown[0] + 9)) for shown in found)
    assert all(shown[0] >= 2 and shown[-1] < 58 for shown in found)
    assert len({shown[0] for shown in found}) > 4
    assert windows(0) == found != windows(1)


def test_validation_takes_the_first_window_and_draws_nothing(tmp_path):
    write_clip(tmp_path / "videos" / "clip.mp4", numbered(60))
    data = dataset(tmp_path, max_num_frames=9, skip_frms_num=2, random_window=False)
    state = torch.get_rng_state()
    assert [numbers(data[0]["mp4"])[0] for _ in range(3)] == [2, 2, 2]
    assert torch.equal(torch.get_rng_state(), state)
    params = {"max_num_frames": 9, "skip_frms_num": 2, "video_size": [HEIGHT, WIDTH], "fps": 8}
    assert data.frame_settings() == params | {"random_window": False}


def test_a_rate_that_varies_is_followed_by_the_timestamps(tmp_path):
    source = write_clip(tmp_path / "source" / "clip.mp4", numbered(60), 30)
    (tmp_path / "videos").mkdir()
    # Every frame of the first half second, then every fourth.
    kept = [n for n in range(60) if n < 15 or n % 4 == 0]
    for name in ("clip.mp4", "clip.mkv"):
        select = ["-vf", "select='lt(n,15)+not(mod(n,4))'", "-fps_mode", "vfr"]
        ffmpeg("-i", source, *select, "-qp", "4", tmp_path / "videos" / name)
    label_all(tmp_path)
    data = dataset(tmp_path)
    assert len(data) == 2  # 56/30 s · 8 = 14.9, so 15 frames, and 13 of them in an item
    for index in range(2):
        shown = np.array(numbers(data.read_clip(index)))
        wanted = [min(kept, key=lambda n: abs(n / 30 - k / 8)) for k in range(13)]
        assert np.abs(shown / 30 - np.arange(13) / 8).max() <= 2 / 30 + 1e-3
        # Where two frames are equally near, either will do.
        assert sum(shown != wanted) <= 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.mov"])
@pytest.mark.parametrize("group", [24, 250])
def test_a_clip_that_was_cut_without_encoding_gives_its_own_frames(tmp_path, name, group):
    source = tmp_path / "source.mp4"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "30", "-i", "-"]
    coding = ["-qp", "4", "-g", group, "-sc_threshold", "0", "-pix_fmt", "yuv420p"]
    ffmpeg(*raw, *coding, source, stdin=numbered(120).tobytes())
    (tmp_path / "videos").mkdir()
    ffmpeg("-ss", "1.1", "-i", source, "-c", "copy", tmp_path / "videos" / name)
    label_all(tmp_path)
    data = dataset(tmp_path)
    for position in (0.0, 0.99):
        shown = np.array(numbers(data.read_clip(0, position=position)))
        # 8 fps of 30: steps of 3.75 frames. A frame that repeats at the end would be a step of 0.
        assert set(np.diff(shown)) == {3, 4}
    if name != "clip.mkv":  # it cannot mark frames before the cut as hidden
        assert numbers(data.read_clip(0))[0] == 33


def test_an_avi_file_without_timestamps_has_a_constant_rate(tmp_path):
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "16", "-i", "-"]
    (tmp_path / "videos").mkdir()
    coding = ["-c:v", "libx264", "-bf", "2", "-g", "8", "-qp", "4", "-pix_fmt", "yuv420p"]
    clip = tmp_path / "videos" / "clip.avi"
    ffmpeg(*raw, *coding, clip, stdin=numbered(50).tobytes())
    label_all(tmp_path)
    data = dataset(tmp_path, max_num_frames=9)
    assert numbers(data.read_clip(0)) == list(range(0, 18, 2))
    assert numbers(data.read_clip(0, position=0.99)) == list(range(32, 50, 2))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotated_clip_is_turned(tmp_path, rotation):
    frames = np.zeros((5, 48, 80, 3), np.uint8)
    frames[:, :24, :40, 0] = 240  # red at the top left
    source = write_clip(tmp_path / "source" / "clip.mp4", frames)
    clip = tmp_path / "videos" / "clip.mp4"
    clip.parent.mkdir()
    ffmpeg("-display_rotation", rotation, "-i", source, "-c", "copy", clip)
    label_all(tmp_path)
    wide = rotation == 180
    video = dataset(tmp_path, video_size=[48, 80] if wide else [80, 48])[0]["mp4"]
    # ffmpeg's angles are counter-clockwise.
    top, left = {90: (False, True), 180: (False, False), 270: (True, False)}[rotation]
    half = [size // 2 for size in video.shape[2:]]
    for rows in (True, False):
        for columns in (True, False):
            part = video[:, 0, : half[0]] if rows else video[:, 0, half[0] :]
            part = part[..., : half[1]] if columns else part[..., half[1] :]
            assert (part.mean() > 0.5) == ((rows, columns) == (top, left))


@pytest.mark.parametrize("width", [16, 72, 130])
@pytest.mark.parametrize("size", [(64, 96), (32, 48), (64, None)])
def test_widths_that_the_decoder_has_trouble_with(tmp_path, width, size):
    frames = np.full((5, 64, width, 3), 200, np.uint8)
    write_clip(tmp_path / "videos" / "clip.mp4", frames)
    size = [size[0], size[1] or width]
    video = dataset(tmp_path, video_size=size)[0]["mp4"]
    assert video.shape == (5, 3, *size)
    assert ((video + 1) * 127.5 - 200).abs().max() < 4


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
    # Five gray levels: the change by H.264, the limited range and resampling at the border.
    assert (video - wanted).abs().max() < 5 / 127.5


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
        "one frame": "too short: 0 frames at 8 fps after dropping 3 at each end; 5 are needed",
        "only ends": "too short",
        "audio": "no video stream",
        "text": "not a video",
        "half": "not a video, or only part",
        "empty": "it is empty",
        "no label": f"label {tmp_path}/labels/no label.txt does not exist",
        "no caption": "no caption.txt holds no text",
        "latin-1": "cannot be read",
    }
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == len(reasons)
    for name, reason in reasons.items():
        named = [line for line in warnings if line.startswith(f"{videos}/{name}.mp4 is skipped: ")]
        assert len(named) == 1 and reason in named[0]


def test_one_process_of_several_does_the_naming(tmp_path, caplog, monkeypatch):
    write_clip(tmp_path / "videos" / "good.mp4", numbered(5))
    (tmp_path / "videos" / "empty.mp4").write_bytes(b"")
    monkeypatch.setenv("RANK", "1")
    assert len(dataset(tmp_path)) == 1
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_the_next_clip_stands_in_for_one_that_turns_out_damaged(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (25, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in ("a", "b", "c"):
        write_clip(tmp_path / "videos" / f"{name}.mp4", noise)
    damage(tmp_path / "videos" / "c.mp4")
    data = dataset(tmp_path)
    assert len(data) == 3
    states, captions = set(), []
    for index in (0, 1, 2, 2):
        torch.manual_seed(0)
        captions.append(data[index]["txt"])
        states.add(bytes(torch.get_rng_state()))
    assert len(states) == 1  # a run that finds the damage draws like one that knows it
    assert captions == ["caption of a", "caption of b", "caption of a", "caption of a"]
    named = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert named == [f"{tmp_path}/videos/c.mp4 is skipped: its frames cannot be decoded"]

    (tmp_path / "videos" / "a.mp4").unlink()
    (tmp_path / "videos" / "b.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 clips can be decoded"):
        data[1]


def test_workers_tell_one_another_what_is_damaged(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (25, HEIGHT, WIDTH, 3), dtype=np.uint8)
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
