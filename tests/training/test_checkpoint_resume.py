"""A stopped or killed run is resumed with the results of an uninterrupted one."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

import train_video
from sgm.cli import run_command
from tests.training.conftest import LORA, module_of

NUM_KILLS = int(os.environ.get("NUM_KILLS", "5"))
EMA = ("--ema-decay", "0.9")
SETTINGS = {
    "accumulation": {"deepspeed": {"gradient_accumulation_steps": 2}},
    "zero-2 in bf16": {"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}},
    "zero-3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "betas by a schedule": {
        "deepspeed": {
            "scheduler": {
                "type": "OneCycle",
                "params": {
                    "cycle_min_lr": 1e-5,
                    "cycle_max_lr": 1e-3,
                    "cycle_first_step_size": 5,
                    "cycle_min_mom": 0.5,
                },
            }
        }
    },
    "lora with zero-1": {
        "model": LORA,
        "deepspeed": {"zero_optimization": {"stage": 1}},
    },
}


def same(one, other):
    weights = module_of(one), module_of(other)
    assert weights[0].keys() == weights[1].keys()
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def steps(caplog):
    """The logged line of each step, without its timing."""
    lines = [record.getMessage() for record in caplog.records]
    return [line.rpartition(", peak")[0].rsplit(",", 2)[0] for line in lines if "step " in line]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_with_the_same_bits(small, tmp_path, caplog, monkeypatch, name):
    monkeypatch.setattr(train_video, "set_up_logging", lambda: None)  # caplog keeps its handler
    caplog.set_level("INFO")
    file = small.file("resume", SETTINGS[name])
    flags = ("--train-iters", "3", "--save-interval", "2", *EMA)
    whole = small.train(file, tmp_path / "whole", *flags)
    straight = steps(caplog)
    caplog.clear()
    part = tmp_path / "part" / whole.name
    shutil.copytree(whole, part)
    shutil.rmtree(part / "3")
    shutil.rmtree(part / "3-ema")
    (part / "latest").write_text("2")
    small.train(file, part.parent, *flags, "--resume", str(part))
    assert [line.split(":")[0] for line in straight] == [f"step {n} of 3" for n in (1, 2, 3)]
    assert steps(caplog) == straight[2:]
    assert same(whole / "3", part / "3") and same(whole / "3-ema", part / "3-ema")
    assert not same(whole / "2", whole / "3") and not same(whole / "3", whole / "3-ema")


@pytest.mark.parametrize("zero", [0, 1])
def test_settings_of_the_optimizer_are_those_of_the_resumed_run(small, tmp_path, zero):
    deepspeed = {"zero_optimization": {"stage": zero}}
    file = small.file("first", {"deepspeed": deepspeed})
    run = small.train(file, tmp_path / "first", "--train-iters", "1")
    params = {"betas": [0.1, 0.2], "weight_decay": 5.0}
    other = small.file("other", {"deepspeed": {**deepspeed, "optimizer": {"params": params}}})
    ends = []
    for name, again in (("same", file), ("other", other)):
        part = tmp_path / name / run.name
        shutil.copytree(run, part)
        small.train(again, part.parent, "--train-iters", "2", "--resume", str(part))
        ends.append(part / "2")
    assert not same(*ends)


def test_a_text_encoder_that_is_trained_is_saved_and_resumed(small, tmp_path):
    node = dict(small.config.model.conditioner_config.params.emb_models[0], is_trainable=True)
    file = small.file("t5", {"model": {"conditioner_config": {"params": {"emb_models": [node]}}}})
    whole = small.train(file, tmp_path / "whole", "--train-iters", "2", "--save-interval", "1")
    run = small.train(file, tmp_path / "part", "--train-iters", "1")
    small.train(file, run.parent, "--train-iters", "2", "--resume", str(run))
    moved = module_of(whole / "1"), module_of(whole / "2")
    names = [name for name in moved[0] if name.startswith("conditioner.")]
    assert sum(not torch.equal(moved[0][name], moved[1][name]) for name in names) > 5
    assert same(whole / "2", run / "2")


def test_resuming_with_other_settings_is_one_sentence(small, tmp_path, capsys):
    divided = small.file("divided", {"deepspeed": {"zero_optimization": {"stage": 1}}})
    run = small.train(divided, tmp_path, "--train-iters", "1")
    resume = ["--device", "cpu", "--resume", str(run), "--train-iters", "2"]

    def error(*argv):
        assert run_command(lambda: train_video.main(list(argv))) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "another zero_optimization.stage" in error("--base", small.file("base"), *resume)
    lora = small.file("lora", {"model": LORA, "deepspeed": {"zero_optimization": {"stage": 1}}})
    assert "holds a whole model, but the configuration trains a LoRA" in error(
        "--base", lora, *resume
    )
    again = ["--base", divided, *resume]
    assert "so the moving average cannot be resumed" in error(*again, *EMA)
    average = run / "1-ema" / "mp_rank_00_model_states.pt"
    average.parent.mkdir()
    for wrong in ({"module": {"any": torch.zeros(2)}}, {"any": torch.zeros(2)}):
        torch.save(wrong, average)  # copied from another run
        assert "does not fit the trained weights" in error(*again, *EMA)
    state = run / "1" / "training_state.pt"
    content = torch.load(state)
    for wrong in ({"step": "x"}, {"samples": -5}, {"processes": None}):
        torch.save(content | wrong, state)
        assert "is not a training state" in error(*again)
    torch.save(content, state)
    state.write_bytes(state.read_bytes()[:1000])
    assert "training_state.pt is not a whole file" in error(*again)
    state.unlink()
    assert f"start a new run with load: {run / '1'}" in error(*again)


def test_a_lora_without_a_state_is_found_before_data_is_read(small, tmp_path, capsys, monkeypatch):
    file = small.file("lora", {"model": LORA})
    run = small.train(file, tmp_path, "--train-iters", "1")
    (run / "1" / "training_state.pt").unlink()  # as tools/import_lora.py leaves it
    monkeypatch.setattr(train_video, "load_data", lambda *_: pytest.fail("too late"))
    argv = ["--base", file, "--device", "cpu", "--resume", str(run), "--train-iters", "2"]
    assert run_command(lambda: train_video.main(argv)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"load: {run / '1'} (if it contains a LoRA, merge it with tools/merge_lora.py" in error


def test_a_run_resumed_at_an_earlier_step_replaces_its_later_checkpoints(
    small, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(train_video, "set_up_logging", lambda: None)  # caplog keeps its handler
    file = small.file("earlier")
    flags = ("--save-interval", "1", "--train-iters", "3")
    run = small.train(file, tmp_path / "runs", *flags, *EMA)
    weights = module_of(run / "3")
    small.train(file, run.parent, *flags, "--resume", str(run / "3"))  # nothing is left to do
    assert (run / "3-ema").is_dir()
    small.train(file, run.parent, *flags, "--resume", str(run / "1"))
    found = module_of(run / "3")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert "later checkpoints (2, 3) are renamed" in caplog.text
    folders = sorted(path.name for path in run.iterdir() if path.name[0].isdecimal())
    assert folders == ["1", "1-ema", "2", "3"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def _train(argv):
    torch.set_num_threads(1)
    raise SystemExit(run_command(lambda: train_video.main(argv)))


def test_a_run_that_is_killed_at_any_moment_resumes(small, tmp_path):
    """The environment variable NUM_KILLS sets the number of kills; few by default, for speed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["tests.training.test_checkpoint_resume", "deepspeed", "sgm.engine"]
    )
    fresh = ["--base", small.file("base"), "--device", "cpu", "--save", str(tmp_path)]
    fresh += ["--save-interval", "2", "--save-total-limit", "2", "--train-iters", "100000", *EMA]
    draw = random.Random(0)
    reached = []
    for _ in range(NUM_KILLS):
        argv = fresh + (["--resume", "latest"] if reached else [])
        process = processes.Process(target=_train, args=(argv,))
        process.start()
        deadline = time.monotonic() + 300
        newest = reached[-1] if reached else 0
        while latest(tmp_path) <= newest:  # until it has saved again
            assert process.is_alive() and time.monotonic() < deadline, process.exitcode
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(latest(tmp_path))
        (run,) = tmp_path.iterdir()
        for name in (f"{reached[-1]}", f"{reached[-1]}-ema"):
            assert len(module_of(run / name)) > 50
    assert all(later > earlier for earlier, later in itertools.pairwise(reached))
    last = str(reached[-1] + 1)
    train_video.main([*fresh, "--resume", "latest", "--train-iters", last])
    assert latest(tmp_path) == int(last)
    assert not list(run.glob("*.partial"))
    assert len([path for path in run.iterdir() if path.name.isdecimal()]) == 2


def latest(folder):
    found = [int(path.read_text()) for path in folder.glob("*/latest")]
    return found[0] if found else 0
