"""Stored digests of clips are valid for unchanged files only."""

import json
import os
import time

import pytest

from sgm.data import cache_keys
from sgm.data.cache_keys import clip_digests
from sgm.distributed import Ranks


@pytest.fixture
def file(tmp_path):
    return tmp_path / "contents.json"


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "a\udcff.mp4"  # a name that is not UTF-8
    path.write_bytes(b"first")
    return path


@pytest.fixture
def later(monkeypatch):
    """The clock is 10 s ahead, so that files do not count as just written."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 10)


def look_up(file, clip):
    return clip_digests([clip], file, Ranks(), num_threads=1)[clip]


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are digested."""
    names, whole = [], cache_keys.hash_file
    monkeypatch.setattr(cache_keys, "hash_file", lambda p: names.append(p.name) or whole(p))
    return names


def test_a_clip_is_read_once(file, clip, later, read):
    assert look_up(file, clip) == look_up(file, clip)
    assert len(read) == 1


@pytest.mark.parametrize("change", ["content", "other file", "time"])
def test_a_clip_that_was_touched_is_read_again(file, clip, later, read, change):
    before, times = look_up(file, clip), os.stat(clip)
    content = b"first" if change == "time" else b"other"  # of the same length
    if change == "other file":
        new = clip.with_name("new")
        new.write_bytes(content)
        os.replace(new, clip)
    else:
        clip.write_bytes(content)
    if change != "time":
        os.utime(clip, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (look_up(file, clip) == before) == (change == "time")
    assert len(read) == 2


def test_a_clip_that_was_just_written_is_not_remembered(file, clip, read):
    look_up(file, clip)
    look_up(file, clip)
    assert len(read) == 2 and not file.exists()


def test_what_was_known_stays_and_a_clip_that_is_gone_is_none(file, clip, later, read):
    other = clip.with_name("b.mp4")
    other.write_bytes(b"b")
    for path in (clip, other):
        look_up(file, path)
    assert look_up(file, clip) and len(read) == 2
    clip.unlink()
    assert look_up(file, clip) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"a": 1}', b"[" * 9999])
def test_a_damaged_memory_is_empty(file, clip, later, read, content):
    file.write_bytes(content)
    assert look_up(file, clip) == look_up(file, clip)
    assert len(read) == 1  # it is whole again after the first


@pytest.mark.parametrize("digest", [None, 5])
def test_what_is_no_digest_is_not_taken_for_one(file, clip, later, digest):
    known = look_up(file, clip)
    content = json.loads(file.read_text())
    ((name, (state, _)),) = content.items()
    file.write_text(json.dumps({name: (state, digest)}))
    assert look_up(file, clip) == known


def test_a_clip_that_changes_while_it_is_read_is_not_remembered(file, clip, later, monkeypatch):
    whole = cache_keys.hash_file

    def hash_and_change(path):
        digest = whole(path)
        path.write_bytes(b"other")
        return digest

    monkeypatch.setattr(cache_keys, "hash_file", hash_and_change)
    look_up(file, clip)
    assert not file.exists()


def test_a_clip_that_takes_long_to_read_is_judged_by_when_it_was_looked_at(
    file, clip, monkeypatch, read
):
    now = iter([0.0, *(60.0 * minute for minute in range(1, 9))])
    start = clip.stat().st_ctime
    monkeypatch.setattr(time, "time", lambda: start + next(now))
    look_up(file, clip)
    assert not file.exists()


def test_what_others_wrote_meanwhile_stays(file, clip, later, monkeypatch):
    other = clip.with_name("b.mp4")
    other.write_bytes(b"b")
    whole = cache_keys.hash_file

    def hash_while_others_write(path):
        monkeypatch.setattr(cache_keys, "hash_file", whole)
        look_up(file, other)
        return whole(path)

    monkeypatch.setattr(cache_keys, "hash_file", hash_while_others_write)
    look_up(file, clip)
    assert len(json.loads(file.read_text())) == 2


def test_a_folder_that_cannot_be_written_to_does_no_harm(tmp_path, clip, later):
    assert look_up(tmp_path / "absent" / "contents.json", clip)
