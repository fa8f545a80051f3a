"""Files and folders are whole or missing, and errors give the real reason."""

import errno
import os
import shutil

import pytest
import torch

from sgm.errors import UserError
from sgm.files import exists, expanded, make_output_folder, new_folder, replacing, save_torch


def test_a_home_is_expanded_and_that_of_an_unknown_user_is_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a"
    assert str(expanded("~nouser/a")) == "~nouser/a"
    assert exists("~") and not any(map(exists, ("~/a", "~nouser/a", "a" * 300, "a\0b")))


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


def test_new_folder_appears_whole_and_nothing_beside_it(tmp_path):
    with new_folder(tmp_path / "up" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "up" / "out").exists()
    assert os.listdir(tmp_path / "up") == ["out"]
    assert (tmp_path / "up" / "out" / "a").read_text() == "1"


def test_a_failure_leaves_nothing_not_even_the_folders_above(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with new_folder(tmp_path / "up" / "out") as folder:
            (folder / "a").write_text("1")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_left_alone(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")
    with pytest.raises(UserError, match="out exists already"):
        with new_folder(path):
            pass
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_within_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        with new_folder(tmp_path / "file" / "out"):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_called_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match="no space left on device"):
        with new_folder(tmp_path / "out"):
            raise OSError("torch.save failed")
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        with new_folder(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_without_a_name_is_refused():
    with pytest.raises(UserError, match="its name is empty"):
        make_output_folder("")
