"""Every weight file of a run is read once, by one function, and opened a few times at most."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

import sample_video
import train_video
from sgm.checkpoint import reading
from sgm.checkpoint.find import MODEL_FILES
from sgm.checkpoint.lora_formats import expected_matrices, lora_layers
from sgm.checkpoint.transformer import MODEL_PREFIX, read_transformer
from tests.small_weights import sat2hf
from tests.training.conftest import LORA, small  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "CogVideoX-tiny-sat"
CONFIG = ROOT / "configs" / "cogvideox_tiny_infer.yaml"
MOST_OPENED = 3


@pytest.fixture
def reads(monkeypatch):
    """How often each path was read."""
    counts, original = Counter(), reading.read_weights

    def counting(path, **how):
        counts[path.resolve()] += 1
        return original(path, **how)

    monkeypatch.setattr(reading, "read_weights", counting)
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder of the bundled model, and a configuration that names it."""
    made = tmp_path_factory.mktemp("diffusers") / "model"
    assert sat2hf("--base", CONFIG, "--output_path", made) == 0
    sections = yaml.safe_load(CONFIG.read_text())
    sections["args"]["load"] = str(made)
    sections["model"]["first_stage_config"]["params"]["ckpt_path"] = str(made)
    for embedder in sections["model"]["conditioner_config"]["params"]["emb_models"]:
        embedder["params"]["model_dir"] = str(made)
    made.with_name("model.yaml").write_text(yaml.safe_dump(sections))
    return made


def words_of(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle")
    two_steps = {"model": {"sampler_config": {"params": {"num_steps": 2}}}}
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump(two_steps))
    config = f"{config} {tmp_path / 'steps.yaml'}"
    flags = f"--device cpu --sampling-num-frames 1 --output-dir {tmp_path / 'out'}"
    return [*f"--base {config} --input-file {tmp_path / 'prompts.txt'} {flags}".split()]


def weights_in(folder):
    return {path.resolve() for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")}


def test_a_sampling_run_reads_each_file_once(reads, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sample_video.main(words_of(CONFIG, tmp_path)) == 0
    assert reads == dict.fromkeys(weights_in(BUNDLED), 1)


def test_a_sampling_run_reads_each_lora_once(reads, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shapes = expected_matrices(lora_layers([0]), read_transformer(BUNDLED / "transformer").base, 2)
    record = {"r": 2, "lora_alpha": 1.0, "layer_range": [0], "base": None}
    module = {MODEL_PREFIX + name: torch.ones(like.shape) for name, like in shapes.items()}
    torch.save({"module": module, "lora": record}, tmp_path / "lora.pt")
    reads.clear()
    words = [*words_of(CONFIG, tmp_path), "--lora", str(tmp_path / "lora.pt")]
    assert sample_video.main(words) == 0
    assert reads == dict.fromkeys(weights_in(BUNDLED) | {tmp_path / "lora.pt"}, 1)


def test_a_diffusers_folder_is_read_once(folder, reads, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sample_video.main(words_of(folder.with_name("model.yaml"), tmp_path)) == 0
    assert reads == dict.fromkeys(weights_in(folder), 1)


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_resumed_run_reads_each_file_once(small, reads, tmp_path, kind):  # noqa: F811
    file = small.file("reading", {"model": LORA} if kind == "lora" else {})
    run = small.train(file, tmp_path / "runs", "--train-iters", "1")
    reads.clear()
    small.train(file, run.parent, "--train-iters", "2", "--resume", str(run))
    checkpoint = {run / "1" / name for name in (MODEL_FILES[0], "training_state.pt")}
    parts = {small.folder / "3d-vae.pt", *(small.folder / "t5").glob("*.safetensors")}
    if kind == "lora":
        parts |= set((small.folder / "transformer").rglob("*.pt"))
    assert reads == {path.resolve(): 1 for path in checkpoint | parts}


def cached(small, tmp_path):  # noqa: F811
    """Flags of a run with a cache, and with validation videos before, in and after two steps."""
    args = {"cache_dir": str(tmp_path / "cache"), "valid_prompts": ["a circle"], "eval_interval": 1}
    short = {"sampler_config": {"params": {"num_steps": 2}}}
    file = small.file("cached", {"args": args, "model": short})
    return ["--base", file, "--device", "cpu", "--train-iters", "2"]


def weights_of(small):  # noqa: F811
    return weights_in(small.folder) - weights_in(small.folder / "runs")


def test_a_cached_run_reads_each_file_once_when_the_cache_is_made_and_later(
    small,  # noqa: F811
    reads,
    tmp_path,
):
    for start in ("first", "second"):
        reads.clear()
        assert train_video.main([*cached(small, tmp_path), "--save", str(tmp_path / start)]) == 0
        assert len(list(tmp_path.glob(f"{start}/*/validation/*/*.mp4"))) == 3
        assert reads == dict.fromkeys(weights_of(small), 1)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("run", ["sampling", "sampling of diffusers' layout", "cached training"])
def test_a_weight_file_is_opened_a_few_times_only(small, folder, tmp_path, run):  # noqa: F811
    if run == "cached training":
        words = ["train_video.py", *cached(small, tmp_path), "--save", str(tmp_path / "runs")]
        files = weights_of(small)
    else:
        config, place = CONFIG, BUNDLED
        if run != "sampling":
            config, place = folder.with_name("model.yaml"), folder
        words, files = ["sample_video.py", *words_of(config, tmp_path)], weights_in(place)
    trace = [
        "strace",
        "--seccomp-bpf",
        "-f",
        "-y",
        "-e",
        "trace=openat",
        "-o",
        str(tmp_path / "trace"),
    ]
    command = [sys.executable, *words]
    subprocess.run([*trace, *command], cwd=ROOT, check=True, capture_output=True)
    # Behind the file descriptor that a call returned stands the file, whatever it was opened as.
    opened = re.findall(r"= \d+<([^>]+)>", (tmp_path / "trace").read_text())
    counts = Counter(Path(path) for path in opened if path.endswith((".pt", ".safetensors")))
    assert all(1 <= counts[path] <= MOST_OPENED for path in files), counts
