"""Training steps: what they change, in one process and in two; interruptions and bad values."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

import sample_video
import train_video
from arguments import parse_config
from sgm.checkpoint.find import find_transformer
from sgm.checkpoint.reading import read_checkpoint
from sgm.config import TrainingArgs
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.models.transformer import DiffusionTransformer
from sgm.sat_runtime import ensure_process_groups
from sgm.training.deepspeed_engine import seeks_scale, start_deepspeed, take_step
from sgm.training.loop import TrainingObjective
from tests.parallel.processes import run_ranks
from tests.training.conftest import LORA, ROOT, module_of

CPU = torch.device("cpu")
EMA = ("--ema-decay", "0.9")
SAMPLING = {
    "args": {
        "input_type": "txt",
        "latent_channels": 8,
        "sampling_num_frames": 1,
        "sampling_image_size": [64, 96],
    },
    "model": {"sampler_config": {"params": {"num_steps": 2}}},
}


def start_of(small):
    """The weights that runs start from."""
    return read_checkpoint(find_transformer(small.folder / "transformer").path)["module"]


def test_a_step_with_learning_rate_0_changes_no_weight_and_no_video(small, tmp_path):
    still = small.file("still", {"deepspeed": {"optimizer": {"params": {"lr": 0.0}}}})
    run = small.train(still, tmp_path / "runs", "--train-iters", "1")
    after = module_of(run / "1")
    assert all(torch.equal(after[n], w.float()) for n, w in start_of(small).items())
    (tmp_path / "prompts.txt").write_text("a red circle")
    videos = []
    for name, load in (("before", small.folder / "transformer"), ("after", run)):
        outputs = tmp_path / name
        argv = ["--base", small.file("sample", SAMPLING), "--device", "cpu", "--load", str(load)]
        argv += ["--output-dir", str(outputs), "--input-file", str(tmp_path / "prompts.txt")]
        assert sample_video.main(argv) == 0
        (video,) = outputs.rglob("*.mp4")
        videos.append(video.read_bytes())
    assert videos[0] == videos[1]


def test_a_lora_step_changes_nothing_but_its_matrices(small):
    config = parse_config(TrainingArgs, "", ["--base", small.file("lora", {"model": LORA})])
    ensure_process_groups()
    engine, load_weights = train_video.build_engine(config, train_video.check(config))
    load_weights(CPU)
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    wrapped = start_deepspeed(TrainingObjective(engine), config.deepspeed, config.args)
    latents, cond = engine.get_input({"mp4": torch.zeros(1, 5, 3, 64, 96), "txt": ["a"]})
    wrapped.backward(wrapped(latents, cond))
    wrapped.step()
    changed = {n for n, tensor in engine.state_dict().items() if not torch.equal(tensor, before[n])}
    # B starts at zero, so A has no gradient in the first step.
    assert changed == {n for n in before if ".matrix_B." in n} and changed
    assert len(before) > 100


def train_as_rank(rank: int, argv: list[str]) -> int:
    return train_video.main(argv)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_give_the_result_of_one(small, tmp_path, stage):
    # By default noise levels depend on the rank, so the runs would differ.
    alike = {"model": {"loss_fn_config": {"params": {"sigma_sampler_config": {}}}}}
    sampling = alike["model"]["loss_fn_config"]["params"]["sigma_sampler_config"]
    sampling["params"] = {"uniform_sampling": False}
    zero = {"zero_optimization": {"stage": stage}}
    flags = ["--train-iters", "2", "--save-interval", "2", "--ema-decay", "0.9"]
    accumulated = {"deepspeed": {**zero, "gradient_accumulation_steps": 2}}
    one = small.train(small.file("one", alike, accumulated), tmp_path / "one", *flags)
    base = small.file("two", alike, {"deepspeed": zero})
    argv = ["--base", base, "--device", "cpu", "--save", str(tmp_path / "two"), *flags]
    if stage == 1:  # start it once as users do
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *command, ROOT / "train_video.py", *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
    else:
        assert run_ranks(train_as_rank, 2, argv, log=tmp_path / "log") == [0, 0]
    (two,) = (tmp_path / "two").iterdir()
    assert (two / "2" / "optimizer_rank_01.pt").is_file()
    for name in ("2", "2-ema"):
        found, expected = module_of(two / name), module_of(one / name)
        for key, tensor in expected.items():
            # Sums of gradients in another order; Adam magnifies their rounding.
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)
        moved = [n for n, w in start_of(small).items() if (expected[n] - w).abs().max() > 1e-4]
        assert len(moved) > 20
    with pytest.raises(UserError, match="saved by 2 processes .* NPROC=2, or start a new run"):
        train_video.main([*argv, "--resume", str(two), "--train-iters", "3"])


def test_a_loss_that_is_not_finite_skips_its_step_and_ends_the_run_at_the_limit(
    small, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(train_video, "set_up_logging", lambda: None)
    whole, calls = SATVideoDiffusionEngine.get_input, iter(range(100))

    def broken(self, batch):
        latents, cond = whole(self, batch)
        return (latents * torch.nan if next(calls) in (1, 3, 4) else latents), cond

    monkeypatch.setattr(SATVideoDiffusionEngine, "get_input", broken)
    flags = ("--save-interval", "1", "--train-iters", "9", "--nonfinite-limit", "2")
    with pytest.raises(UserError, match="not finite for 2 steps in a row, up to step 5"):
        small.train(small.file("base"), tmp_path, *flags)
    (run,) = tmp_path.iterdir()
    weights = [module_of(run / str(step)) for step in (1, 2, 3, 4)]
    name = "model.diffusion_model.time_embed.0.weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[1][name], weights[2][name])
    assert weights[2][name].isfinite().all()
    said = "step 2: the loss or its gradient is not finite; the step is skipped (1 of at most 2"
    assert said in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 3}},
    ],
    ids=["plain", "bf16", "zero-1", "zero-2 in bf16", "zero-3"],
)
def test_a_gradient_that_is_not_finite_skips_its_step_too(
    small, tmp_path, monkeypatch, caplog, settings
):
    monkeypatch.setattr(train_video, "set_up_logging", lambda: None)
    whole, calls = TrainingObjective.forward, iter(range(100))

    def broken(self, latents, cond):
        loss = whole(self, latents, cond)
        # sqrt(0) is 0, and its derivative is not finite.
        return loss + torch.sqrt(0 * loss) if next(calls) > 0 else loss

    monkeypatch.setattr(TrainingObjective, "forward", broken)
    file = small.file("gradient", {"deepspeed": settings})
    flags = ("--save-interval", "1", "--train-iters", "9", "--nonfinite-limit", "2", *EMA)
    with pytest.raises(
        UserError, match="gradient was not finite for 2 steps in a row, up to step 3"
    ):
        small.train(file, tmp_path, *flags)
    (run,) = tmp_path.iterdir()
    for suffix in ("", "-ema"):
        first, second = (module_of(run / f"{step}{suffix}") for step in (1, 2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert "step 2: the loss or its gradient is not finite" in caplog.text


@pytest.mark.parametrize(
    ("optimizer", "seeks"),
    [
        (SimpleNamespace(loss_scale=4, loss_scaler=SimpleNamespace(min_scale=1)), True),
        (SimpleNamespace(loss_scale=1, loss_scaler=SimpleNamespace(min_scale=1)), False),
        (SimpleNamespace(loss_scale=4, loss_scaler=SimpleNamespace()), False),
    ],
)
def test_an_overflow_is_expected_while_the_scale_can_fall(optimizer, seeks):
    half = SimpleNamespace(fp16_enabled=lambda: True, optimizer=optimizer)
    assert seeks_scale(half) == seeks
    assert not seeks_scale(SimpleNamespace(fp16_enabled=lambda: False, optimizer=optimizer))


def test_a_step_that_seeks_the_scale_is_not_counted(small, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train_video, "set_up_logging", lambda: None)
    monkeypatch.setattr("sgm.training.loop.seeks_scale", lambda wrapped: True)
    monkeypatch.setattr("deepspeed.DeepSpeedEngine.was_step_applied", lambda self: False)
    caplog.set_level("INFO")
    flags = ("--train-iters", "3", "--save-interval", "3", "--nonfinite-limit", "1", *EMA)
    zero = {"deepspeed": {"zero_optimization": {"stage": 1}}}
    run = small.train(small.file("seeks", zero), tmp_path, *flags)
    average = module_of(run / "3-ema")  # is not updated in skipped steps
    assert all(torch.equal(average[n], w.float()) for n, w in start_of(small).items())
    assert "not finite" not in caplog.text
    assert "step 3 of 3" in caplog.text and "grad norm" not in caplog.text  # it is infinite then


def test_validation_encodes_as_training_does_and_runs_the_network_under_its_autocast(
    small, tmp_path, monkeypatch
):
    under = {"encoding": [], "network": []}

    def recorded(name, function):
        def call(*args, **kwargs):
            under[name].append(torch.is_autocast_enabled("cpu"))
            return function(*args, **kwargs)

        return call

    engine = SATVideoDiffusionEngine
    encode = recorded("encoding", engine.encode_first_stage)
    monkeypatch.setattr(engine, "encode_first_stage", encode)
    forward = recorded("network", DiffusionTransformer.forward)
    monkeypatch.setattr(DiffusionTransformer, "forward", forward)
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    data = {"valid_data": [str(small.folder / "clips")], "valid_videos": 0}
    file = small.file("autocast", {"deepspeed": autocast, "args": data})
    small.train(file, tmp_path, "--train-iters", "1")
    assert under["encoding"] == [False] * 3  # before the step, in it and after it
    assert len(under["network"]) == 9 and all(under["network"])


def test_a_scale_of_the_loss_that_cannot_fall_is_one_sentence():
    scaler = DynamicLossScaler(
        init_scale=2, scale_window=1000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False,
        raise_error_at_min_scale=True, dtype=torch.float16,
    )  # fmt: skip
    wrapped = SimpleNamespace(step=lambda: scaler.update_scale(True))
    take_step(wrapped)
    with pytest.raises(UserError, match="overflow at every loss scale, .*; lower the learning"):
        take_step(wrapped)
    wrapped.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        take_step(wrapped)


def test_weights_that_are_not_finite_are_not_saved(small, tmp_path, monkeypatch):
    whole, calls = SATVideoDiffusionEngine.get_input, iter(range(100))

    def ruin(self, batch):
        if next(calls) == 1:
            next(self.model.parameters()).data.fill_(torch.nan)
        return whole(self, batch)

    monkeypatch.setattr(SATVideoDiffusionEngine, "get_input", ruin)
    with pytest.raises(UserError, match="has values that are not finite, so no checkpoint is"):
        small.train(small.file("base"), tmp_path, "--save-interval", "1", "--train-iters", "3")
    (run,) = tmp_path.iterdir()
    assert (run / "latest").read_text() == "1"
    assert not (run / "2").exists()


def test_validation_before_the_first_step_is_the_same_with_divided_weights(
    small, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(train_video, "set_up_logging", lambda: None)
    caplog.set_level("INFO")
    valid = {"args": {"valid_data": [str(small.folder / "clips")], "valid_videos": 0}}
    # 0 divides small weights, such as LoRA's, too.
    divided = {"stage": 3, "stage3_param_persistence_threshold": 0}
    for name, zero in (("whole", {"stage": 0}), ("divided", divided)):
        file = small.file(name, valid, {"model": LORA, "deepspeed": {"zero_optimization": zero}})
        small.train(file, tmp_path / name, "--train-iters", "1")
    lines = [record.getMessage() for record in caplog.records]
    whole, divided = (line for line in lines if line.startswith("step 0: validation loss"))
    assert whole == divided


def test_every_optimizer_that_scales_the_loss_has_its_scale():
    """Steps in float16 need a GPU, so this tests only that the attribute exists."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    assert all(hasattr(kind, "loss_scale") for kind in kinds)
