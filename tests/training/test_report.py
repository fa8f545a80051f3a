"""The report of a run: lines, smoothing, metrics.jsonl, TensorBoard, and wandb."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sgm.errors import UserError
from sgm.training import report as report_module
from sgm.training.report import Report


class Clock:
    """Time that passes only when a test sets it."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(report_module, "time", clock)
    return clock


@pytest.fixture
def build(tmp_path, caplog):
    """A function that makes reports from arguments; they are closed at the end."""
    caplog.set_level(logging.INFO, logger="sgm")
    made = []

    def make(*, start_step=0, total_steps=1000, is_main=True, **args):
        defaults = {"log_interval": 2, "wandb": False, "wandb_project_name": "project"}
        defaults["train_iters"] = total_steps
        made.append(
            Report(
                SimpleNamespace(**defaults | args),
                folder=tmp_path / "run-01",
                start_step=start_step,
                samples_per_step=4,
                is_main=is_main,
            )
        )
        return made[-1]

    (tmp_path / "run-01").mkdir()
    yield make
    for one in made:
        one.close()


def run(report, losses, *, first=1, clock=None, **figures):
    figures = {"lr": 1e-4} | figures
    for step, loss in enumerate(losses, first):
        if clock is not None:
            clock.now += 0.5
        report.step(step, torch.tensor(loss), **figures)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("sgm")]


def test_a_line_has_all_figures(build, clock, caplog):
    run(build(), [1.0, 3.0], clock=clock, grad_norm=torch.tensor(0.517), loss_scale=65536.0)
    # Weights of the smoothed loss: 0.02 · 0.98 for the first, 0.02 for the second; so it is
    # (0.98 · 1 + 3) / 1.98 = 2.0101. Two steps took 1 s; 998 are left, 499 s.
    (line,) = lines(caplog)
    assert re.fullmatch(
        r"step 2 of 1000: loss 2\.0000 \(smoothed 2\.0101\), lr 1\.00e-04, grad norm 0\.517, "
        r"loss scale 65536, 0\.500 s/step, 8\.0 samples/s, peak \d+\.\d GiB, 0:08:19 left",
        line,
    )


def test_missing_values_are_left_out(build, caplog):
    run(build(), [1.0, 1.0])
    assert re.search(r"lr 1\.00e-04, \d+\.\d{3} s/step", lines(caplog)[0])


def test_lines_come_at_the_interval_and_at_the_end_with_the_mean_since_the_last(build, caplog):
    run(build(log_interval=3, total_steps=7), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0])
    found = [re.match(r"step (\d+) of 7: loss (\S+) ", line).groups() for line in lines(caplog)]
    assert found == [("3", "2.0000"), ("6", "5.0000"), ("7", "10.0000")]
    assert lines(caplog)[-1].endswith(" 0:00:00 left")


def test_the_line_of_a_skipped_step_comes_with_the_next_one(build, clock, caplog):
    report = build(log_interval=2)
    run(report, [1.0], clock=clock)
    clock.now += 1.0  # step 2 is skipped and nothing reported
    run(report, [3.0, 5.0], first=3, clock=clock)
    first, second = lines(caplog)
    assert first.startswith("step 3 of 1000: loss 2.0000 ") and "0.667 s/step" in first
    assert second.startswith("step 4 of 1000: loss 5.0000 ") and "0.500 s/step" in second


def test_a_loss_that_is_not_finite_is_left_out_of_the_means(build, caplog):
    run(build(), [1.0, math.nan, math.inf, math.nan, 2.0, 2.0])
    found = [re.search(r"loss (\S+) \(smoothed (\S+)\)", line).groups() for line in lines(caplog)]
    # At step 6 the first loss has the weight 0.98⁵, the last two 0.98 and 1.
    smoothed = (0.98**5 + 2 * 0.98 + 2) / (0.98**5 + 0.98 + 1)
    assert found == [("1.0000", "1.0000"), ("nan", "1.0000"), ("2.0000", f"{smoothed:.4f}")]


def test_what_is_saved_is_the_same_share_on_each_process(build, monkeypatch):
    one, other = build(log_interval=9), build(log_interval=9)
    run(one, [1.0, 2.0])
    run(other, [3.0, 6.0])
    sums = one._sums + other._sums
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(sums))
    assert one.state_dict() == other.state_dict() == {"sums": (sums / 2).tolist()}
    assert torch.equal(one._sums, other._sums)  # so each process can resume from either


def test_the_loss_is_not_read_before_a_line_is_due(build, monkeypatch):
    report = build(log_interval=3)
    for name in ("tolist", "item", "__float__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waits for the device"))
    run(report, [1.0, 2.0])


def test_pauses_do_not_count(build, clock, caplog):
    report = build()
    run(report, [1.0], clock=clock)
    with report.pause():
        clock.now += 1000.0
    run(report, [1.0], first=2, clock=clock)
    assert "0.500 s/step" in lines(caplog)[0]
    with pytest.raises(ZeroDivisionError), report.pause():
        clock.now += 1 / 0


def test_a_resumed_report_says_the_same_losses(build, caplog):
    losses = [0.3, 1.7, 0.1, 0.9, 2.2, 0.4]
    run(build(), losses)
    straight = lines(caplog)
    caplog.clear()
    first = build()
    run(first, losses[:3])
    second = build(start_step=3)
    second.load_state_dict(first.state_dict())
    run(second, losses[3:], first=4)
    figures = r"step \d of 1000: loss \S+ \(smoothed \S+\)"
    assert [re.match(figures, line)[0] for line in lines(caplog)] == [
        re.match(figures, line)[0] for line in straight
    ]


def test_losses_are_the_mean_over_processes(build, monkeypatch, caplog):
    others = [torch.tensor([[8.0, 2.0], [8.0, 2.0]], dtype=torch.float64)]
    report = build()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.add_(others[0]))
    run(report, [1.0] * 4)
    # (1 + 1 + 8) / (2 + 2); fading, the own losses of two steps weigh 0.0396 in all.
    total, number = 0.0396 + 8, 0.0396 + 2
    assert f"loss 2.5000 (smoothed {total / number:.4f})" in lines(caplog)[0]
    # Each process continues from half of that, faded by two more steps.
    total, number = (0.98**2 * half / 2 + own for half, own in ((total, total), (number, number)))
    assert f"loss 2.5000 (smoothed {total / number:.4f})" in lines(caplog)[1]


def test_other_processes_log_and_write_nothing(build, caplog, tmp_path):
    report = build(is_main=False)
    run(report, [1.0, 1.0])
    report.validation(2, {"loss": 1.0})
    with report.pause():
        pass
    assert lines(caplog) == [] and list((tmp_path / "run-01").iterdir()) == []


def test_validation_is_one_line(build, caplog):
    report = build()
    report.validation(0, {"loss": 0.25, "loss 0-249": 0.5, "loss 250-499": 0.0})
    report.validation(2, {})
    assert lines(caplog) == [
        "step 0: validation loss 0.2500 (loss 0-249 0.5000, loss 250-499 0.0000)"
    ]


def events(folder):
    """The events of all files of a folder: records of length, checksum, content, checksum."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_has_every_curve_as_soon_as_the_line_is_logged(build, clock, tmp_path):
    report = build()
    run(report, [1.0, 3.0], clock=clock, grad_norm=0.5, loss_scale=256.0)
    report.validation(2, {"loss": 0.25, "loss 0-249": 0.5})
    version, train, valid = events(tmp_path / "run-01" / "tensorboard")
    assert version.file_version == "brain.Event:2" and train.step == valid.step == 2
    curves = {value.tag: value.simple_value for value in train.summary.value}
    assert curves.pop("train/peak_gib") > 0
    assert curves == pytest.approx(
        {
            "train/loss": 2.0, "train/loss_smoothed": 3.98 / 1.98, "train/lr": 1e-4,
            "train/grad_norm": 0.5, "train/loss_scale": 256.0, "train/seconds_per_step": 0.5,
            "train/samples_per_second": 8.0,
        }
    )  # fmt: skip
    curves = {value.tag: value.simple_value for value in valid.summary.value}
    assert curves == {"valid/loss": 0.25, "valid/loss_0-249": 0.5}


def test_the_metrics_file_has_a_line_for_each_report(build, tmp_path):
    report = build()
    run(report, [math.nan, math.nan, 1.0, 3.0])
    report.validation(4, {"loss": 0.25, "loss 0-249": 0.5})
    path = tmp_path / "run-01" / "metrics.jsonl"
    first, second, valid = map(json.loads, path.read_text().splitlines())
    assert first["step"] == 2 and first["train/loss"] is None and "train/grad_norm" not in first
    assert (second["step"], second["train/loss"], second["train/lr"]) == (4, 2.0, 1e-4)
    assert valid == {"step": 4, "valid/loss": 0.25, "valid/loss_0-249": 0.5}
    with path.open("a") as file:
        file.write('{"step": 5, "train/lo')  # the process is killed
    build(start_step=3)
    assert path.read_text() == json.dumps(first) + "\n"


def test_tensorboard_hides_what_a_resumed_run_does_again(build, tmp_path):
    build(start_step=3)
    session = events(tmp_path / "run-01" / "tensorboard")[-1]
    assert session.step == 4 and session.session_log.status == SessionLog.START


def test_a_full_disk_ends_the_curves_and_not_the_run(build, caplog):
    report = build()

    def fail(*_):
        raise OSError(28, "No space left on device")

    _, board = report.trackers
    board._writer.write_event = fail
    run(report, [1.0] * 4)
    assert len([line for line in lines(caplog) if line.startswith("step")]) == 2
    assert caplog.text.count("No space left on device; it is disabled now") == 1
    (metrics,) = report.trackers
    metrics.log = fail
    run(report, [1.0] * 4, first=5)
    assert len([line for line in lines(caplog) if line.startswith("step")]) == 4
    assert caplog.text.count("No space left on device; it is disabled now") == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(build, tmp_path):
    (tmp_path / "run-01" / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="tensorboard cannot be written to"):
        build()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar_too(build, monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report = build(start_step=4, total_steps=6)
    run(report, [1.0, 1.0], first=5)
    with report.pause():
        pass
    report.close()
    shown = terminal.getvalue()
    assert "4/6" in shown and "6/6" in shown and "step 6 of 6: loss 1.0000" in shown
    assert lines(caplog) == []


class FakeWandb:
    """Stands in for the package and records its calls."""

    class Error(Exception):
        pass

    def __init__(self, failure=None):
        self.failure, self.starts, self.points, self.finished = failure, [], [], 0

    def init(self, **settings):
        if self.failure is not None:
            raise self.failure
        self.starts.append(settings)
        return self

    def log(self, point, step):
        self.points.append((step, point))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_curves_and_continues_a_resumed_run(build, monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    report = build(wandb=True)
    run(report, [1.0, 3.0])
    report.validation(2, {"loss": 0.25})
    report.close()
    assert fake.finished == 1
    (step, train), valid = fake.points
    assert step == 2 and train["train/loss"] == 2.0 and valid == (2, {"valid/loss": 0.25})
    build(wandb=True, start_step=2)
    first, second = fake.starts
    assert first["project"] == "project" and first["name"] == "run-01"
    assert first["config"]["log_interval"] == 2 and first["resume"] == "allow"
    assert first["id"] == second["id"] and "mode" not in first  # WANDB_MODE decides
    build(wandb=True, is_main=False)
    assert len(fake.starts) == 2


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (FakeWandb.Error("No API key configured."), "No API key configured; log in with `wandb lo"),
        (ValueError("1 error\nmode\n  Input should be"), "1 error mode Input should be; log in"),
        (OSError(), "cannot start: OSError; .* use --no-wandb"),
    ],
)
def test_wandb_that_cannot_start_is_one_sentence(build, monkeypatch, failure, words):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(failure))
    with pytest.raises(UserError, match=words) as error:
        build(wandb=True)
    assert "\n" not in str(error.value)


def test_wandb_that_is_not_installed_is_one_sentence(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed; run pip install wandb"):
        build(wandb=True)
    build(wandb=False)  # and is not needed without it
