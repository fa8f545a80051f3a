"""The sampling command as its users meet it, on small random weights."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from omegaconf import OmegaConf

import sample_video
from sgm import video
from sgm.cli import run_command
from sgm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "cogvideox_tiny_infer.yaml")
PROMPTS = ["a red circle", "a blue square moving up", "a cyan triangle"]


def sample(base, folder, *flags, prompts=PROMPTS):
    """Run the command in this process; its exit code."""
    prompt_file = folder / "prompts.txt"
    prompt_file.write_text("\n".join(prompts), encoding="utf-8")
    paths = ["--input-file", str(prompt_file), "--output-dir", str(folder / "out")]
    return run_command(lambda: sample_video.main([*base, *paths, *flags]))


def frames(path):
    return iio.imread(path, plugin="FFMPEG")


@pytest.fixture(scope="session")
def sampled(base, tmp_path_factory):
    """The output folder of a run with three prompts and two samples each."""
    folder = tmp_path_factory.mktemp("sampled")
    assert sample(base, folder, "--batch-size", "2") == 0
    return folder / "out"


def test_every_prompt_and_sample_has_its_video_sheet_and_record(sampled):
    names = ["0_a red circle", "1_a blue square moving up", "2_a cyan triangle"]
    assert sorted(os.listdir(sampled)) == names
    for name in names:
        assert sorted(os.listdir(sampled / name)) == ["0", "1"]
        for sample_number in ("0", "1"):
            files = sorted(os.listdir(sampled / name / sample_number))
            assert files == ["000000.mp4", "contact_sheet.png", "run.json"]


def test_the_output_folder_may_be_in_the_home(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sample(base, tmp_path, "--output-dir", "~/videos", prompts=PROMPTS[:1]) == 0
    assert (tmp_path / "videos" / "0_a red circle" / "0" / "000000.mp4").is_file()


def test_the_video_has_the_format_asked_for(sampled):
    path = sampled / "0_a red circle" / "0" / "000000.mp4"
    meta = iio.immeta(path, plugin="FFMPEG")
    assert (meta["codec"], meta["fps"]) == ("h264", 8.0)
    assert meta["pix_fmt"].startswith("yuv420p")
    assert frames(path).shape == (9, 64, 96, 3)  # 3 latent frames


def test_the_record_says_how_to_make_the_video_again(sampled):
    record = json.loads((sampled / "2_a cyan triangle" / "1" / "run.json").read_text())
    assert (record["prompt"], record["line"], record["sample"]) == ("a cyan triangle", 2, 1)
    assert record["seed"] == 42 and record["args"]["sampling_fps"] == 8
    assert record["model"]["sampler_config"]["params"]["num_steps"] == 2
    assert "torch" in record["versions"] and record["timings"]["sampling_seconds"] > 0


def test_samples_prompts_and_seeds_differ(base, sampled, tmp_path):
    first = (sampled / "0_a red circle" / "0" / "000000.mp4").read_bytes()
    assert first != (sampled / "0_a red circle" / "1" / "000000.mp4").read_bytes()
    assert sample(base, tmp_path, "--seed", "43", prompts=PROMPTS[:1]) == 0
    assert first != (tmp_path / "out" / "0_a red circle" / "0" / "000000.mp4").read_bytes()


def test_a_prompt_gives_the_same_bytes_alone_and_among_others(base, sampled, tmp_path):
    assert sample(base, tmp_path, prompts=["", PROMPTS[1]]) == 0  # on its line, with nothing else
    place = Path("1_a blue square moving up") / "0" / "000000.mp4"
    assert (tmp_path / "out" / place).read_bytes() == (sampled / place).read_bytes()


def test_torchrun_splits_the_prompts_and_a_failing_rank_lets_the_others_finish(
    base, sampled, tmp_path
):
    blocked = "1_a blue square moving up"  # the second process's only prompt
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / blocked).write_text("a file where the folder should be")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [sys.executable, "-m", "tools.launch.torchrun", "--nproc_per_node=2", "--standalone"]
    paths = ["--input-file", str(tmp_path / "prompts.txt"), "--output-dir", str(tmp_path / "out")]
    run = subprocess.run(
        [*command, "sample_video.py", *base, *paths],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 1 and "error: prompt 1 failed" in run.stderr, run.stderr
    assert f"{PROMPTS[0]}/0/000000.mp4 (" in run.stderr  # what was written, and nothing more
    assert "Traceback" not in run.stderr and "ChildFailedError" not in run.stderr, run.stderr
    for name in set(os.listdir(sampled)) - {blocked}:
        video, expected = (
            place / name / "0" / "000000.mp4" for place in (tmp_path / "out", sampled)
        )
        # One thread instead of two changes sums in the last digits, not what is seen.
        assert np.abs(frames(video).astype(int) - frames(expected)).max() <= 2


def test_a_file_for_training_on_latents_samples_too(base, sampled, tmp_path):
    overlay = write(tmp_path / "latents.yaml", b"model: {latent_input: true}")
    assert sample([*base, overlay], tmp_path, prompts=PROMPTS[:1]) == 0
    place = Path("0_a red circle") / "0" / "000000.mp4"
    assert (tmp_path / "out" / place).read_bytes() == (sampled / place).read_bytes()


def test_a_negative_prompt_changes_the_video(base, tmp_path):
    strong = "model: {sampler_config: {params: {guider_config: {params: {scale: 1000}}}}}"
    base = [*base, write(tmp_path / "strong.yaml", strong.encode())]
    videos = []
    for flags in ([], ["--negative-prompt", "blur"]):
        assert sample(base, tmp_path, *flags, prompts=PROMPTS[:1]) == 0
        path = tmp_path / "out" / "0_a red circle" / "0" / "000000.mp4"
        videos.append(path.read_bytes())
    assert videos[0] != videos[1]


def test_bf16_runs_on_the_cpu_and_is_close(base, sampled, tmp_path):
    assert sample(base, tmp_path, "--bf16", prompts=PROMPTS[:1]) == 0
    place = Path("0_a red circle") / "0" / "000000.mp4"
    difference = frames(tmp_path / "out" / place).astype(int) - frames(sampled / place)
    # bfloat16 keeps 8 bits: single pixels move, the picture stays.
    assert np.abs(difference).mean() < 6


def test_slow_settings_and_another_number_of_steps_give_warnings(
    base, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("sgm.loading.LARGE_MODEL", 0)
    assert sample(base, tmp_path, "--parallel", "video", "--tile-decode", prompts=PROMPTS[:1]) == 0
    printed = capfd.readouterr().err
    assert "this model takes many minutes per step" in printed
    assert "num_steps is 30 in guider_config but 2 in the sampler, so the guidance" in printed


def test_a_prompt_that_is_too_long_gives_a_warning_that_quotes_the_rest(base, tmp_path, capfd):
    prompts = ["a red circle moving left on a black background " * 3 + "zebra"]
    assert sample(base, tmp_path, prompts=prompts) == 0
    warning = capfd.readouterr().err
    assert "longer than 32 tokens" in warning and "zebra'" in warning


@pytest.mark.parametrize(
    ("strengths", "same"), [({"untrained": 1.0, "trained": 0.0}, True), ({"trained": 1.0}, False)]
)
def test_a_lora_that_learned_nothing_changes_nothing_and_another_does(
    base, loras, sampled, tmp_path, capfd, strengths, same
):
    place = Path("0_a red circle") / "0"
    expected = (sampled / place / "000000.mp4").read_bytes()
    # A lora_config in the same file is for training; here the LoRA is merged.
    lora = "lora_config: {target: sat.model.finetune.lora2.LoraMixin, params: {r: 9}}"
    overlay = write(tmp_path / "lora.yaml", f"model: {{{lora}}}".encode())
    choices = [{"path": str(loras / name), "scale": scale} for name, scale in strengths.items()]
    flags = ["--lora", *(f"{choice['path']}:{choice['scale']}" for choice in choices)]
    assert sample([*base, overlay], tmp_path, *flags, prompts=PROMPTS[:1]) == 0
    video = (tmp_path / "out" / place / "000000.mp4").read_bytes()
    assert (video == expected) == same
    record = json.loads((tmp_path / "out" / place / "run.json").read_text())
    assert record["args"]["lora"] == choices
    assert "was trained on other weights" not in capfd.readouterr().err


def test_a_wrong_lora_is_found_before_anything_is_loaded(base, loras, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sgm.engine.SATVideoDiffusionEngine.load_weights", None)
    whole = OmegaConf.load(base[1]).args.load
    assert sample(base, tmp_path, "--lora", str(tmp_path / "none")) == 1
    assert "error: lora: " in capfd.readouterr().err
    assert sample(base, tmp_path, "--lora", whole) == 1
    assert "is a whole model, not a LoRA" in capfd.readouterr().err
    monkeypatch.undo()
    assert sample(base, tmp_path, "--load", str(loras / "trained")) == 1
    assert "is a LoRA, not a whole model; load must name its base" in capfd.readouterr().err


def run_cli(*flags, stdin=None):
    return subprocess.run(
        [sys.executable, "sample_video.py", *flags],
        cwd=ROOT, capture_output=True, text=True, input=stdin, check=False,
    )  # fmt: skip


def test_start_up_leaves_out_what_only_training_needs():
    names = {"pytorch_lightning", "torchmetrics", "decord", "sgm.training.loop"}
    code = f"import sgm.engine, sample_video, sys; print(sorted({names} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"


def test_prompts_can_be_typed(base, tmp_path):
    flags = ["--input-type", "cli", "--output-dir", str(tmp_path / "out")]
    run = run_cli(*base, *flags, stdin="a red circle\n\na cyan triangle\n")
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["0_a red circle", "2_a cyan triangle"]
    # Nothing but our own lines: libraries do not report what they miss or load.
    warning, ready, *videos = run.stderr.splitlines()
    assert warning.startswith("num_steps is 30 in guider_config")
    assert ready.startswith("model ready on ") and len(videos) == 2
    assert all(line.startswith(str(tmp_path / "out")) for line in videos)
    assert run.stdout == ""


def test_nothing_typed_is_one_sentence(base, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert sample(base, tmp_path, "--input-type", "cli") == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: no prompt was typed")


def write(path, content):
    path.write_bytes(content)
    return str(path)


MISTAKES = {
    "missing prompt file": (lambda p: ["--input-file", str(p / "no.txt")], "No such file"),
    "empty prompt file": (lambda p: ["--input-file", write(p / "e", b"\n")], "contains no prompt"),
    "not UTF-8": (lambda p: ["--input-file", write(p / "b", b"caf\xe9")], "not valid UTF-8"),
    "unwritable folder": (lambda p: ["--output-dir", "/proc/out"], "cannot be written to"),
    "folder is a file": (lambda p: ["--output-dir", write(p / "f", b"x")], "cannot be written to"),
    "missing weights": (lambda p: ["--load", str(p / "none")], "does not exist"),
    "weights are a page": (lambda p: ["--load", write(p / "w.pt", b"<html>")], "web page"),
    "image size": (lambda p: ["--sampling-image-size", "64", "64"], r"[64, 96]"),
    "number of frames": (lambda p: ["--sampling-num-frames", "17"], "5 (17)"),
    "no GPU": (lambda p: ["--device", "cuda"], "sees no GPU"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_gives_one_sentence_and_exit_code_1(base, tmp_path, capfd, monkeypatch, kind):
    make_flags, words = MISTAKES[kind]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sample(base, tmp_path, *make_flags(tmp_path)) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]


def test_the_command_itself_prints_the_sentence_without_a_trace(base, tmp_path):
    run = run_cli(*base, "--input-file", str(tmp_path / "absent.txt"))
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: input_file")
    assert "Traceback" not in run.stderr


def test_a_mistyped_flag_exits_with_2(base):
    run = run_cli(*base, "--outptu-dir", "x")
    assert run.returncode == 2 and "did you mean '--output-dir'" in run.stderr


YAML_MISTAKES = {
    "model: {lora: run}": "lora is under model in the configuration; move it to args",
    "model: {scale_facto: 1.0}": "did you mean 'scale_factor'",
    "model: {sampler_config: {params: {num_step: 5}}}": "did you mean 'num_steps'",
    "model: {network_config: {params: {num_layer: 5}}}": "did you mean 'num_layers'",
    "model: {sampler_config: {target: os.system}}": "--allow-target os",
    "model: {sampler_config: {target: sgm.modules.diffusionmodules.sampling.DDIM}}": "no class",
    "model: {network_config: {params: {time_embed_dim: 64}}}": "does not fit",
}


@pytest.mark.parametrize("text", YAML_MISTAKES)
def test_a_mistake_in_yaml_is_named(base, tmp_path, capfd, text):
    overlay = write(tmp_path / "overlay.yaml", text.encode())
    assert sample([*base, overlay], tmp_path) == 1
    assert YAML_MISTAKES[text] in capfd.readouterr().err


def test_one_failing_prompt_does_not_stop_the_rest(base, tmp_path, monkeypatch, capfd):
    original = video.write_mp4

    def full_disk(chunks, path, *, fps):
        if "blue" not in str(path):
            return original(chunks, path, fps=fps)
        raise UserError(f"{path} cannot be written: no space left on device")

    monkeypatch.setattr(video, "write_mp4", full_disk)
    assert sample(base, tmp_path) == 1
    assert "error: prompt 1 failed" in capfd.readouterr().err
    out = tmp_path / "out"
    assert (out / "0_a red circle/0/000000.mp4").is_file()
    assert (out / "2_a cyan triangle/0/000000.mp4").is_file()


WRITE_TO_A_FULL_DISK = """
import os, sys
from pathlib import Path
import numpy as np
from sgm.errors import UserError
from sgm import video

folder = Path(sys.argv[1])
noise = np.random.default_rng(0).integers(0, 255, (16, 128, 128, 3), dtype=np.uint8)
writes = {
    "mp4": lambda path: video.write_mp4([noise], path, fps=8),
    "png": lambda path: video.write_contact_sheet(noise, path),
    "json": lambda path: video.write_json({"text": "x" * 10**6}, path),
}
for suffix, write in writes.items():
    try:
        write(folder / f"file.{suffix}")
    except UserError as error:
        print(error)
print(os.listdir(folder))
"""


@pytest.mark.parametrize("limit", ["disk", "file size"])
def test_a_full_disk_gives_one_sentence_and_leaves_no_partial_file(tmp_path, limit):
    run = [sys.executable, "-c", WRITE_TO_A_FULL_DISK, str(tmp_path)]
    if limit == "disk":
        mount = 'mount -t tmpfs -o size=32k tmpfs "$0"'
        isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        if subprocess.run([*isolated, mount, str(tmp_path)], capture_output=True).returncode:
            pytest.skip("users cannot mount a small disk on this machine")
        run = [*isolated, mount + ' && exec "$@"', str(tmp_path), *run]
    else:
        run = ["sh", "-c", 'ulimit -f 8 && exec "$@"', "sh", *run]  # 8 blocks of 512 bytes
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    *errors, left = done.stdout.splitlines()
    assert len(errors) == 3 and all("cannot be written" in error for error in errors), done
    if limit == "disk":
        assert all("no space left on device" in error for error in errors)
    assert left == "[]" and not done.stderr
