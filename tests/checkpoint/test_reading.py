"""Safe reading of weight files from strangers, and the errors for other files."""

import argparse
import builtins
import collections
import datetime
import errno
import os
import pickle
import random
import warnings
import zipfile

import numpy as np
import omegaconf
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from safetensors.torch import save_file

from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.vae import load_vae_state
from sgm.checkpoint.weight_file import check_kind
from sgm.errors import UserError


class CallsSystem:
    """Runs a shell command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pickled_code_ran",)


def test_tensors_come_back_and_training_objects_do_no_harm(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    weight = torch.arange(6.0).reshape(2, 3)
    saved = {
        "module": {"a": weight},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "args": argparse.Namespace(lr=0.1),
        "loss_scaler": LossScaler(1.0),
    }
    torch.save(saved, path)
    state = read_checkpoint(path)
    assert torch.equal(state["module"]["a"], weight)
    assert not isinstance(state["args"], argparse.Namespace)


def filled_defaultdict():
    lists = collections.defaultdict(list)
    lists["a"].append(1)
    return lists


OBJECTS = {
    "omegaconf": omegaconf.OmegaConf.create({"lr": 0.1, "model": {"sizes": [1, {"a": None}]}}),
    "defaultdict": filled_defaultdict(),
    "deque": collections.deque([1.0, 2.0], maxlen=5),
    "datetime": [datetime.datetime(2024, 8, 6), datetime.timedelta(1), datetime.timezone.utc],
    "types": [int, float, str, list, dict, set, slice(1, 2)],
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_training_saves_do_no_harm(tmp_path, kind):
    weight = torch.arange(3.0)
    torch.save({"module": {"a": weight}, "beside": OBJECTS[kind]}, tmp_path / "a.pt")
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["module"]["a"], weight)


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "open", "__import__"])
def test_functions_of_python_are_refused(tmp_path, name):
    torch.save({"a": torch.ones(1), "b": getattr(builtins, name)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="pickled code"):
        read_checkpoint(tmp_path / "a.pt")


def write_pickle(path, data):
    """A file of torch.save whose pickle is `data`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3")


DAMAGED = {
    "pop from nothing": b"\x80\x02\x85.",
    "an unknown memo": b"\x80\x02h\x05.",
    "cut off in a number": b"\x80\x02J\x01",
    "cut off in a length": b"\x80\x02X\x01",
    "no end": b"\x80\x02",
    "state of the wrong form": b"\x80\x02ccollections\nOrderedDict\n)RK\x01b.",
}


@pytest.mark.parametrize("form", ["zip", "plain"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_pickle_is_refused_in_one_sentence(tmp_path, kind, form):
    path = tmp_path / "a.pt"
    if form == "zip":
        write_pickle(path, DAMAGED[kind])
    else:
        path.write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match="a.pt") as failure:
        read_checkpoint(path)
    assert "\n" not in str(failure.value)


def test_another_pickle_protocol_raises_no_warning(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pt", pickle_protocol=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_checkpoint(tmp_path / "a.pt") == {"a": 1}


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    (tmp_path / "a.pt").write_text("x")
    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(UserError, match="a.pt cannot be read: Permission denied"):
        check_kind(tmp_path / "a.pt")


def test_a_name_of_any_length_is_one_sentence(tmp_path):
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / ("a" * 5000))


def test_what_torch_saved_is_known_by_content(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    assert read_checkpoint(path)["a"].tolist() == [1, 1, 1]


def test_safetensors_are_known_by_content(tmp_path):
    path = tmp_path / "weights.pt"  # the name of the other format
    save_file({"a": torch.ones(3)}, path)
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(3))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    state = {"module": {"a": torch.ones(1)}, "x": CallsSystem()}
    torch.save(state, "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="pickled code"):
        read_checkpoint("evil.pt")
    assert not os.path.exists("pickled_code_ran")


def test_plain_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(CallsSystem()))
    with pytest.raises(UserError, match="not"):
        read_checkpoint("evil.pkl")
    assert not os.path.exists("pickled_code_ran")


def _write_truncated(path):
    torch.save({"module": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def _write_truncated_safetensors(path):
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def _write_other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vae/3d-vae.pt", "x")


BROKEN = {
    "web page": (lambda p: p.write_text("<!DOCTYPE html><html>quota</html>"), "web page"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "git-lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
    "truncated": (_write_truncated, "not a whole file"),
    "truncated safetensors": (_write_truncated_safetensors, "safetensors"),
    "another zip": (_write_other_zip, "zip archive of something else"),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 9), "not"),
    "text": (lambda p: p.write_text("hello, these are not weights"), "not"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_in_one_sentence(tmp_path, kind):
    write, words = BROKEN[kind]
    path = tmp_path / "weights.pt"
    write(path)
    with pytest.raises(UserError, match=words) as failure:
        read_checkpoint(path)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pt")


def test_vae_state_leaves_out_the_loss_and_finds_the_engines_part(tmp_path):
    weight = torch.ones(2)
    torch.save({"state_dict": {"encoder.a": weight, "loss.b": weight}}, tmp_path / "3d-vae.pt")
    assert list(load_vae_state(tmp_path / "3d-vae.pt")) == ["encoder.a"]
    save_file({"first_stage_model.decoder.a": weight, "other": weight + 1}, tmp_path / "engine")
    assert list(load_vae_state(tmp_path / "engine")) == ["decoder.a"]
    save_file({"transformer.a": weight}, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="holds no video autoencoder"):
        load_vae_state(tmp_path / "dit.safetensors")


def test_one_key_to_ignore_may_be_a_plain_text(tmp_path):
    save_file({"encoder.a": torch.ones(1), "loss.b": torch.ones(1)}, tmp_path / "vae")
    assert list(load_vae_state(tmp_path / "vae", "loss")) == ["encoder.a"]
    with pytest.raises(UserError, match="holds no video autoencoder"):
        load_vae_state(tmp_path / "vae", "encoder")
    assert len(load_vae_state(tmp_path / "vae", "xe")) == 2


def test_a_small_file_cannot_ask_for_a_large_memory(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"module": {"a": torch.zeros(1).expand(10**13)}}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="'a' is not a dense tensor of real numbers, or its values"):
        tensors_of(read_checkpoint(path), path)
    shared = torch.arange(6.0)  # views, as of tied weights, are read
    torch.save({"module": {"a": shared.view(2, 3).T, "b": shared[1:3]}}, path)
    assert tensors_of(read_checkpoint(path), path)["a"].shape == (3, 2)
