"""Entries of the cache are whole or missing, with several writers and after a kill too."""

import os
import time

import pytest
import torch

from sgm.data.cache import Store
from sgm.errors import UserError
from sgm.files import replacing


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store", "moments")
    store.prepare()
    return store


def test_a_tensor_comes_back_in_its_type(store):
    tensor = torch.randn(2, 3).to(torch.bfloat16).t()
    assert not store.holds("a")
    store.write("a", tensor)
    assert store.holds("a") and torch.equal(store.read("a"), tensor)
    assert store.read("a").dtype == torch.bfloat16
    assert [path.name for path in store.folder.iterdir()] == ["a.safetensors"]


def test_two_writers_of_one_entry_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with replacing(path, shared=True) as one, replacing(path, shared=True) as other:
        one.write_text("whole")
        other.write_text("wh")
        os.replace(one, path)  # the first is done while the second still writes
        assert path.read_text() == "whole"
        other.write_text("whole")
        one.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_once_it_is_old(store):
    old, new = (store.folder / f".{name}.partial.safetensors" for name in ("a.1", "a.2"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.prepare()
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written to"):
        Store(tmp_path / "file" / "latents", "moments").prepare()
