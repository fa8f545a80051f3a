"""The Python API: its videos are the command's, and one call leaves nothing behind for the next."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import sample_video
from sgm import CogVideoX
from sgm.errors import UserError
from sgm.pipeline import Step, Video

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python-api.md"
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(base):
    with CogVideoX.from_config(base[1]) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def expected(pipe):
    """The frames of the prompt with the configuration's own values."""
    return pipe(PROMPT).frames


def command_bytes(base, folder, *flags, prompts=(PROMPT,), place="0_a red circle/0"):
    """The mp4 that sample_video.py writes."""
    (folder / "prompts.txt").write_text("\n".join(prompts))
    paths = ["--input-file", str(folder / "prompts.txt"), "--output-dir", str(folder / "out")]
    assert sample_video.main([*base, *paths, *flags]) == 0
    return (folder / "out" / place / "000000.mp4").read_bytes()


def examples():
    """The code blocks of docs/python-api.md."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)


def test_the_page_runs_and_its_first_lines_make_the_bytes_of_the_command(
    tmp_path, monkeypatch, capsys
):
    for name in ("configs", "CogVideoX-tiny-sat"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    first, *others = examples()
    assert len(first.strip().splitlines()) == 6
    scope = {}
    exec(first, scope)
    prompt = "a red circle moving right on a black background"
    command = command_bytes(
        ["--base", "configs/cogvideox_tiny_infer.yaml"],
        tmp_path,
        prompts=[prompt],
        place=f"0_{prompt}/0",
    )
    assert (tmp_path / "circle.mp4").read_bytes() == command
    make_tiny_lora(tmp_path / "ckpts" / "tiny-lora")
    for example in others:
        exec(example, scope)
    assert (tmp_path / "videos" / "square.mp4").is_file()
    assert scope["quick"].frames.shape == (9, *scope["video"].frames.shape[1:])
    assert not np.array_equal(scope["with_lora"].frames, scope["without"].frames)
    assert "num_frames=50 is not possible with this model" in capsys.readouterr().out


def make_tiny_lora(folder):
    """A LoRA run of the bundled model whose matrices are not zero."""
    from arguments import parse_config
    from sgm.checkpoint.lora import lora_record
    from sgm.checkpoint.transformer import MODEL_PREFIX, is_lora_matrix, load_transformer
    from sgm.config import SamplingArgs
    from sgm.util import instantiate_from_config

    config = parse_config(SamplingArgs, "", ["--base", "configs/cogvideox_tiny_infer.yaml"])
    node = config.model["network_config"]
    lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 2}}
    node["params"]["modules"]["lora_config"] = lora
    with torch.device("meta"):
        network = instantiate_from_config(node)
    base = load_transformer(network, config.args.load, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    matrices = {n: torch.randn_like(w) for n, w in network.named_parameters() if is_lora_matrix(n)}
    module = {MODEL_PREFIX + name: matrix / 4 for name, matrix in matrices.items()}
    (folder / "5").mkdir(parents=True)
    (folder / "latest").write_text("5")
    state = {"module": module, "lora": lora_record(network, base)}
    torch.save(state, folder / "5" / "mp_rank_00_model_states.pt")


def test_a_call_makes_the_commands_video_of_that_line_and_sample(pipe, base, tmp_path):
    flags = ["--batch-size", "2", "--seed", "7"]
    prompts = ["another", PROMPT]
    command = command_bytes(base, tmp_path, *flags, prompts=prompts, place="1_a red circle/1")
    video = pipe(PROMPT, seed=7, index=(1, 1), path=tmp_path / "new" / "folder" / "video.mp4")
    assert (tmp_path / "new" / "folder" / "video.mp4").read_bytes() == command
    video.save(tmp_path / "another" / "saved.mp4")
    assert (tmp_path / "another" / "saved.mp4").read_bytes() == command
    assert video.fps == iio.immeta(tmp_path / "another" / "saved.mp4", plugin="FFMPEG")["fps"]


def test_every_value_of_a_call_is_its_own(pipe, base, tmp_path, expected):
    config = json.loads(json.dumps(pipe.engine.sampler.guider.__dict__))
    changed = pipe(PROMPT, num_steps=3, guidance_scale=2.0, num_frames=1, negative_prompt="dark")
    assert changed.frames.shape == (1, *expected.shape[1:])
    assert not np.array_equal(changed.frames[0], expected[0])
    assert pipe.engine.sampler.guider.__dict__ == config
    np.testing.assert_array_equal(pipe(PROMPT).frames, expected)
    sampler = pipe.engine.sampler.adjusted(num_steps=3, guidance_scale=2.0)
    assert (sampler.num_steps, sampler.guider.num_steps, sampler.guider.scale) == (3, 3, 2.0)
    flags = ["--negative-prompt", "dark"]
    command = command_bytes(base, tmp_path, *flags)
    pipe(PROMPT, negative_prompt="dark", path=tmp_path / "dark.mp4")
    assert (tmp_path / "dark.mp4").read_bytes() == command


def test_a_stream_reports_each_step_and_the_video_last(pipe, expected):
    *steps, video = pipe.stream(PROMPT, num_steps=4)
    assert all(isinstance(step, Step) for step in steps) and isinstance(video, Video)
    assert [(step.step_index, step.num_steps) for step in steps] == [(n, 4) for n in range(4)]
    latents = steps[-1].latents
    preview = steps[-1].preview()
    assert preview.shape == (latents.shape[1], *latents.shape[3:], 3) and preview.dtype == np.uint8
    frames = np.concatenate(list(pipe.decode(latents)))
    np.testing.assert_array_equal(frames, video.frames)


def test_integers_of_numpy_are_integers(pipe):
    plain = pipe(PROMPT, seed=7, index=(1, 2), num_frames=1, num_steps=2)
    seed, line, sample, one, two = np.array([7, 1, 2, 1, 2])
    same = pipe(PROMPT, seed=seed, index=(line, sample), num_frames=one, num_steps=two)
    np.testing.assert_array_equal(same.frames, plain.frames)
    with pytest.raises(UserError, match="seed: True must be a whole number"):
        pipe(PROMPT, seed=True)


def test_latents_alone_are_those_of_the_video(pipe, expected):
    *_, step = pipe.stream(PROMPT, decode=False)
    np.testing.assert_array_equal(np.concatenate(list(pipe.decode(step.latents))), expected)


def test_leaving_the_loop_stops_the_run_and_leaves_nothing_behind(pipe, expected):
    calls = []
    handle = pipe.engine.model.register_forward_hook(lambda *_: calls.append(1))
    for _ in pipe.stream(PROMPT, num_steps=5):
        break
    handle.remove()
    assert len(calls) == 1
    np.testing.assert_array_equal(pipe(PROMPT).frames, expected)


def test_a_second_call_while_one_runs_is_refused(pipe, expected):
    steps = pipe.stream(PROMPT)
    next(steps)
    with pytest.raises(UserError, match="this pipeline is making a video; wait until"):
        pipe(PROMPT)
    with pytest.raises(UserError, match="this pipeline is making a video"):
        pipe.set_loras([])
    errors = []

    def call():
        try:
            pipe(PROMPT)
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(errors) == 1
    steps.close()
    np.testing.assert_array_equal(pipe(PROMPT).frames, expected)


def test_loras_that_are_set_give_the_bytes_of_a_fresh_start_back_and_forth(
    base, loras, pipe, expected
):
    trained = f"{loras / 'trained'}:0.7"
    with CogVideoX.from_config(base[1], lora=[trained]) as fresh:
        with_lora = fresh(PROMPT).frames
        assert not np.array_equal(with_lora, expected)
        fresh.set_loras([])
        np.testing.assert_array_equal(fresh(PROMPT).frames, expected)
    for _ in range(2):
        pipe.set_loras([trained])
        np.testing.assert_array_equal(pipe(PROMPT).frames, with_lora)
        pipe.set_loras([])
        np.testing.assert_array_equal(pipe(PROMPT).frames, expected)
    with pytest.raises(UserError, match="does not exist"):
        pipe.set_loras([str(loras / "none")])
    np.testing.assert_array_equal(pipe(PROMPT).frames, expected)


def test_close_frees_the_weights_and_ends_all_calls(base):
    pipe = CogVideoX.from_config(base[1])
    engine = pipe.engine
    running = pipe.stream(PROMPT)
    pipe.close()
    pipe.close()
    weights = [*engine.parameters(), *engine.buffers()]
    assert weights and all(weight.numel() == 0 for weight in weights)
    assert not list(running)
    for call in (pipe, lambda _: pipe.set_loras([]), lambda _: next(pipe.decode(torch.zeros(1)))):
        with pytest.raises(UserError, match="this pipeline is closed"):
            call(PROMPT)


def test_an_error_within_a_with_block_ends_the_run_and_frees_the_weights(base):
    with pytest.raises(KeyError), CogVideoX.from_config(base[1]) as pipe:
        engine, steps = pipe.engine, pipe.stream(PROMPT)
        step = next(steps)
        raise KeyError
    assert all(weight.numel() == 0 for weight in engine.parameters())
    with pytest.raises(UserError, match="this pipeline is closed"):
        step.preview()


def test_loras_are_set_from_any_folder_and_after_an_interruption(
    base, loras, pipe, expected, monkeypatch, tmp_path
):
    monkeypatch.chdir(Path(base[1]).parent)
    load = ["load", "transformer"]
    with CogVideoX.from_config(base[1], **dict([load])) as moved:
        monkeypatch.chdir(tmp_path)
        moved.set_loras([str(loras / "trained")])
    copies = torch.Tensor.copy_

    def interrupted(weight, *rest):
        copies(weight, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "copy_", interrupted)
        pipe.set_loras([str(loras / "trained")])
    pipe.set_loras([])
    np.testing.assert_array_equal(pipe(PROMPT).frames, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 50}, "num_frames=50 is not possible .* numbers of video frames: 1, 9"),
        ({"num_frames": 9.0}, "num_frames=9.0 is not possible"),
        ({"num_steps": 1}, "num_steps .*=1 must be a whole number from 2 to 1000$"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number$"),
        ({"seed": "7"}, "CogVideoX: seed: '7' must be a whole number"),
        ({"negative_prompt": 3}, "CogVideoX: negative_prompt: 3 must be a string"),
        ({"index": -1}, "index: -1 must be a whole number from 0"),
        ({"index": (1, 2, 3)}, "index: .* must be a whole number from 0"),
        ({"prompt": None}, "prompt: None must be a string"),
        ({"path": 5}, "path: 5 must be the path of an mp4"),
        ({"path": b"x.mp4"}, "path: b'x.mp4' must be the path of an mp4"),
        ({"path": "video.gif"}, "path: 'video.gif' must be the path of an mp4"),
        ({"path": "/dev/null/video.mp4"}, "path: '/dev/null/video.mp4' cannot be written"),
    ],
)
def test_a_wrong_value_is_one_sentence_before_anything_is_computed(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe.stream(**({"prompt": PROMPT} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memry": "low"}, "unknown key 'memry' in from_config; did you mean 'memory'"),
        ({"memory": "lo"}, "from_config: memory: 'lo' must be 'auto' or 'high' or 'low'"),
        ({"sampling_num_frames": 50}, "sampling_num_frames=50 is not a possible number of latent"),
        (
            {"sampling_image_size": (np.int64(64), np.int64(64))},
            r"size=\[64, 64\]",
        ),
        (
            {"load": "nowhere"},
            "load: nowhere does not exist; .* README says where to get the weights",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(base, arguments, message):
    with pytest.raises(UserError, match=message):
        CogVideoX.from_config(base[1], **arguments)


def test_importing_takes_no_pytorch_and_the_class_no_gpu_and_no_process_group():
    code = """
import sys
import sgm
assert "torch" not in sys.modules
from sgm import CogVideoX
import torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
try:
    sgm.CogVideo
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "module 'sgm' has no attribute 'CogVideo'\n", done.stderr
