"""Folders of runs: finding, publishing and deleting checkpoints."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sgm.config import TrainingArgs
from sgm.errors import UserError
from sgm.training import run_folder
from tests.training.conftest import ROOT


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda *_, **__: None)


def saved(run, *iterations):
    for iteration in iterations:
        for name in (f"{iteration}", f"{iteration}-ema"):
            (run_folder.new_partial(run, name) / "weights").write_text(name)
        run_folder.publish(run, iteration, limit=0)
    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_runs_in_one_minute_do_not_share_a_folder(tmp_path):
    args = TrainingArgs(save=str(tmp_path), experiment_name="a")
    run = run_folder.start_run(args)
    assert run.is_dir() and run.name.startswith("a-")
    others = [run_folder.start_run(args) for _ in range(3)]
    assert {other.name for other in others} & {f"{run.name}_2", f"{others[0].name}_2"}
    assert names(tmp_path) == sorted({one.name for one in (run, *others)})
    saved(others[-1], 5)
    resumed = run_folder.find_checkpoint(args.model_copy(update={"resume": "latest"}))
    assert resumed == others[-1] / "5"


def test_other_ranks_take_the_folder_that_rank_0_made(tmp_path, monkeypatch):
    def receive(found, src, device):
        assert src == 0
        found[0] = "made by rank 0"

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", receive)
    args = TrainingArgs(save=str(tmp_path))
    with pytest.raises(UserError, match="does not exist for process 1; set save to .* share"):
        run_folder.start_run(args)  # on another machine with its own disk
    assert names(tmp_path) == []
    (tmp_path / "made by rank 0").mkdir()
    assert run_folder.start_run(args) == tmp_path / "made by rank 0"


def test_latest_means_the_newest_run_of_this_name_that_has_a_checkpoint(tmp_path):
    times = {"a-01-02-03-04": 1000, "a-01-02-03-03": 999, "b-01-02-03-04": 2000}
    times["a-b-01-02-03-04"] = 2000  # of the experiment "a-b"
    for name, time in times.items():
        os.utime(saved(tmp_path / name, 5, 10) / "latest", (time, time))
    (tmp_path / "a-01-02-03-05").mkdir()  # died before its first checkpoint
    args = TrainingArgs(save=str(tmp_path), experiment_name="a", resume="latest")
    assert run_folder.find_checkpoint(args) == tmp_path / "a-01-02-03-04" / "10"


@pytest.mark.parametrize(("given", "found"), [(".", "10"), ("5", "5")])
def test_a_path_may_name_a_run_or_one_of_its_iterations(tmp_path, given, found):
    run = saved(tmp_path / "a", 5, 10)
    args = TrainingArgs(resume=str(run / given))
    assert run_folder.find_checkpoint(args) == run / found


@pytest.mark.parametrize("content", ["../..", "7", "a\0b", ""])
def test_a_folder_without_a_checkpoint_is_one_sentence(tmp_path, content):
    (tmp_path / "latest").write_text(content)
    with pytest.raises(UserError, match="resume: .* is not a checkpoint of a run"):
        run_folder.find_checkpoint(TrainingArgs(resume=str(tmp_path)))
    with pytest.raises(UserError, match="resume: latest: no run named finetune-"):
        run_folder.find_checkpoint(TrainingArgs(resume="latest", save=str(tmp_path)))


@pytest.mark.parametrize("given", ["/", "."])
def test_a_folder_without_a_name_is_not_a_checkpoint(given):
    with pytest.raises(UserError, match="is not a checkpoint of a run"):
        run_folder.find_checkpoint(TrainingArgs(resume=given))


def test_a_name_that_is_too_long_is_one_sentence():
    with pytest.raises(UserError, match="resume: 'aaa.* cannot be looked up .File name too long"):
        run_folder.find_checkpoint(TrainingArgs(resume="a" * 300))


def test_only_the_newest_are_kept_and_half_written_ones_cleared(tmp_path):
    run = saved(tmp_path / "a", 2, 4, 10)
    (run / "12.partial").mkdir()
    run_folder.publish(run, 10, limit=2)
    run_folder.reserve(run)
    assert names(run) == [".lock", "10", "10-ema", "4", "4-ema", "latest"]
    run_folder.publish(run, 10, limit=0)
    assert len(names(run)) == 6


def test_resuming_sets_later_iterations_aside_until_the_next_save(tmp_path, caplog):
    caplog.set_level("WARNING")  # commands that other tests call may have set it higher
    run = saved(tmp_path / "a", 1, 2, 10)
    run_folder.set_aside_later(run / "10")
    assert not caplog.messages and len(names(run)) == 7
    run_folder.set_aside_later(run / "1")
    later = ["10-ema.old", "10.old", "2-ema.old", "2.old"]
    assert names(run) == ["1", "1-ema", *later, "latest"]
    assert (run / "latest").read_text() == "1"
    (message,) = caplog.messages
    assert "resumed at step 1; its later checkpoints (2, 10) are renamed" in message
    (run_folder.new_partial(run, "2") / "weights").write_text("new")  # without a moving average
    run_folder.publish(run, 2, limit=0)
    assert names(run) == ["1", "1-ema", "2", "latest"]
    assert (run / "2" / "weights").read_text() == "new"


@pytest.mark.parametrize("calls_before_the_kill", range(9))
def test_a_process_that_is_killed_while_checkpoints_are_replaced_leaves_a_whole_one(
    tmp_path, monkeypatch, calls_before_the_kill
):
    run = saved(tmp_path / "a", 1, 2)
    replace, calls = os.replace, iter(range(100))

    def killed(*paths):
        if next(calls) == calls_before_the_kill:
            raise KeyboardInterrupt
        replace(*paths)

    def resume():
        run_folder.set_aside_later(run / "1")
        for name in ("2", "2-ema"):
            (run_folder.new_partial(run, name) / "weights").write_text(f"new {name}")
        run_folder.publish(run, 2, limit=1)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            resume()
            raise KeyboardInterrupt  # after the last call
    found = run_folder.find_checkpoint(TrainingArgs(resume=str(run)))
    run_folder.reserve(run)
    new = "new " if found.name == "2" and calls_before_the_kill else ""
    for name in (found.name, f"{found.name}-ema"):
        assert (run / name / "weights").read_text() == f"{new}{name}"
    if found.name == "1":  # and resuming once more works
        resume()
    assert {"2", "2-ema", "latest"} <= set(names(run))
    assert (run / "latest").read_text() == "2"


def test_a_run_that_ended_before_it_saved_has_its_own_sentence(tmp_path):
    run_folder.save_config(
        SimpleNamespace(args=TrainingArgs(), model={}, data={}, deepspeed={}), tmp_path
    )
    with pytest.raises(UserError, match=f"resume: {tmp_path} is not .* --resume$"):
        run_folder.find_checkpoint(TrainingArgs(resume=str(tmp_path)))
    saved(tmp_path, 1, 10)
    (tmp_path / "latest").write_text("")  # the machine went down while it was written
    assert run_folder.find_checkpoint(TrainingArgs(resume=str(tmp_path))) == tmp_path / "10"
    (tmp_path / "latest").unlink()  # the process was killed before it was there
    assert run_folder.find_checkpoint(TrainingArgs(resume=str(tmp_path))) == tmp_path / "10"
    for name in ("1", "10"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / run_folder.CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=f"^resume: {tmp_path} is not a checkpoint of a run"):
        run_folder.find_checkpoint(TrainingArgs(resume=f"{tmp_path}/"))


def test_a_model_that_is_not_as_before_is_named(tmp_path, caplog):
    caplog.set_level("WARNING")
    model = {"scale_factor": 1.15, "network_config": {"params": {"a": [1, 2], "b": None}}}
    config = SimpleNamespace(args=TrainingArgs(), model=model, data={}, deepspeed={})
    run_folder.save_config(config, tmp_path)
    run_folder.compare_with_last_start(config, tmp_path)
    assert not caplog.messages
    config.model = {"scale_factor": 2.0, "network_config": {"params": {"a": [1], "c": 3}}}
    config.deepspeed = {"bf16": {"enabled": False}, "gradient_clipping": 0.5}
    run_folder.compare_with_last_start(config, tmp_path)
    (message,) = caplog.messages
    keys = "scale_factor, network_config"
    assert f"have changed since the run's last start: {keys}; see" in message
    config.deepspeed = {"bf16": {"enabled": True}}
    with pytest.raises(UserError, match="was trained in float32; use the section"):
        run_folder.compare_with_last_start(config, tmp_path)
    for damaged in ("model: [", "model: {}\ndeepspeed: 3"):  # cannot be compared
        (tmp_path / "training_config.yaml").write_text(damaged)
        run_folder.compare_with_last_start(config, tmp_path)
    assert len(caplog.messages) == 1


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, monkeypatch):
    code = "import fcntl, sys; file = open(sys.argv[1] + '/.lock', 'w')\n"
    code += "fcntl.lockf(file, fcntl.LOCK_EX); print('reserved', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "reserved\n"
        with pytest.raises(UserError, match="is being trained by another process"):
            run_folder.reserve(tmp_path)
        other.kill()
    (tmp_path / "3.partial").mkdir()
    with run_folder.reserve(tmp_path):
        assert names(tmp_path) == [".lock"]
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert run_folder.reserve(tmp_path) is None


def test_a_run_that_cannot_be_written_to_is_not_called_taken(tmp_path):
    with pytest.raises(UserError, match="cannot be written to .Not a directory"):
        (tmp_path / "run").touch()
        run_folder.reserve(tmp_path / "run" / "a")
