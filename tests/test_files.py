"""Files are whole or absent, and what went wrong is told as what it was."""

import shutil

import pytest
import torch

from sgm.errors import UserError
from sgm.files import replacing, save_torch


def test_an_error_that_is_not_the_disks_passes_and_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        with replacing(tmp_path / "a.mp4") as partial:
            partial.write_text("half")
            raise RuntimeError("CUDA out of memory")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanished_is_one_sentence(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    with pytest.raises(UserError, match="a.txt cannot be written: No such file"):
        with replacing(folder / "a.txt") as partial:
            shutil.rmtree(folder)
            partial.write_text("lost")


def test_a_state_comes_back_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")
    save_torch({"a": torch.ones(2)}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_torch_save_on_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    path.write_text("old")

    def fill(state, partial):
        partial.write_text("half")
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(UserError, match="state.pt cannot be written: .*free some space"):
        save_torch({}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_state_for_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        save_torch({}, tmp_path / "absent" / "state.pt")
