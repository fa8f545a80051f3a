"""Decoding in a separate process: a hang or a crash affects only its clip."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sgm.data import decoding
from sgm.data.decoding import DecodingProcess, probe_clips
from sgm.data.frames import ClipError, ClipFacts, FrameSettings
from sgm.errors import UserError
from tools.tiny.draw_clips import write_clips
from tools.tiny.shapes import ShapeClips

SETTINGS = FrameSettings((64, 96), fps=8, max_num_frames=17, skip_frms_num=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    write_clips(ShapeClips(1, seed=0), folder)
    return folder / "videos" / "0.mp4"


@pytest.fixture
def pipe(tmp_path):
    """A named pipe without a writer: opening it never ends."""
    os.mkfifo(tmp_path / "x.mp4")
    return tmp_path / "x.mp4"


@pytest.fixture
def process():
    child = DecodingProcess()
    yield child
    child.close()


def child_ids(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_clip_that_hangs_is_given_up_and_its_process_ends(process, clip, pipe, monkeypatch):
    assert process.probe(clip, SETTINGS) == ClipFacts(17, 64, 96, 8.0, 17, 17)
    hanging = process._child.pid
    monkeypatch.setattr(decoding, "CLIP_SECONDS", 0.3)
    with pytest.raises(ClipError, match="took more than 0.3 s"):
        process.probe(pipe, SETTINGS)
    assert not is_alive(hanging)
    monkeypatch.undo()
    assert process.probe(clip, SETTINGS).count == 17


def test_a_header_that_crashes_the_decoder_costs_only_its_clip(process, clip, tmp_path):
    content = bytearray(clip.read_bytes())
    # In the table of frame durations: 2 billion frames have the first duration.
    content[content.find(b"stts") + 12] = 0x7F
    crashing = tmp_path / "crashing.mp4"
    crashing.write_bytes(content)
    with pytest.raises(ClipError, match="makes the decoder crash.*bad_alloc"):
        process.probe(crashing, SETTINGS)
    assert process.probe(clip, SETTINGS).count == 17


def test_a_process_that_ended_between_two_clips_blames_neither(process, clip):
    process.probe(clip, SETTINGS)
    idle = process._child.pid
    os.kill(idle, signal.SIGKILL)
    wait_until(lambda: not is_alive(idle))
    assert process.probe(clip, SETTINGS).count == 17


def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next(process, clip, monkeypatch):
    facts = process.probe(clip, SETTINGS)

    def interrupted(self, seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DecodingProcess, "_receive", interrupted)
        process.read(clip, SETTINGS, facts=facts, first=0)
    assert process.probe(clip, SETTINGS) == facts


def test_threads_take_turns(process, clip):
    facts = process.probe(clip, SETTINGS)
    found = []

    def read(length):
        frames = process.read(clip, SETTINGS, facts=replace(facts, length=length), first=0)
        found.append(frames.shape[0] == length)

    threads = [threading.Thread(target=read, args=(length,)) for length in (5, 9, 13, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_the_child_ends_with_a_process_that_is_killed(clip, pipe):
    owner = os.fork()
    if owner == 0:
        DecodingProcess().probe(pipe, SETTINGS)  # never returns
        os._exit(0)
    wait_until(lambda: child_ids(owner))
    (child,) = child_ids(owner)
    time.sleep(0.3)  # now or later, before its first line or at the pipe: it must end
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    wait_until(lambda: not is_alive(child))


def test_a_clip_that_was_replaced_is_not_taken_for_the_one_that_was_probed(process, clip, tmp_path):
    facts = ClipFacts(frames=40, height=64, width=96, rate=8.0, count=40, length=17)
    with pytest.raises(ClipError, match="has changed"):
        process.read(clip, SETTINGS, facts=facts, first=0)


def test_a_decoder_that_cannot_start_is_an_error_of_the_machine(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_ROOT", tmp_path)
    monkeypatch.setattr(decoding, "OWN_CHILD", DecodingProcess())
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(UserError, match="does not start .*No module named 'sgm'"):
        probe_clips([clip], SETTINGS)


@pytest.fixture
def second_of_two(monkeypatch):
    """A function; after its call this is the second process, and its argument the first one's."""

    def call(sent):
        monkeypatch.setattr(
            decoding.Ranks, "__enter__", lambda self: setattr(self, "rank", 1) or self
        )
        monkeypatch.setattr(decoding.Ranks, "gather", lambda self, own: [sent, own])

    return call


def test_processes_that_train_together_go_on_with_what_the_first_found(clip, second_of_two):
    facts = ClipFacts(9, 1, 1, 8.0, 9, 9)
    second_of_two(([clip], [facts]))
    assert probe_clips([clip], SETTINGS) == [facts]
    with pytest.raises(UserError, match=r"process 1 does not find .*\(2 here, 1 there\)"):
        probe_clips([clip, clip], SETTINGS)


def test_a_mistake_that_the_first_process_meets_ends_the_others_too(clip, second_of_two):
    second_of_two(UserError("no decoder"))
    with pytest.raises(UserError, match="no decoder"):
        probe_clips([clip], SETTINGS)


def test_a_pipe_is_no_clip(clip, pipe, monkeypatch):
    monkeypatch.setattr(decoding, "CLIP_SECONDS", 0.3)  # it would never end
    refused, found = decoding.probe_clips([pipe, clip], SETTINGS)
    assert str(refused) == "it is not a file" and found.count == 17
