"""Weights are written whole or not at all, and read back bit for bit."""

import json
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file

from sgm.checkpoint.reading import read_checkpoint
from sgm.checkpoint.tensors import LazyTensors, in_dtype
from sgm.errors import UserError
from sgm.files import new_folder
from tests.conftest import full_disk
from tools.weights.writing import own_storage, save_sat_transformer, save_sharded

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).half(),  # an odd number of two bytes: what follows must be aligned
    "c": torch.randn(4, 4).bfloat16().T,
    "d": torch.tensor(2.5, dtype=torch.float64),
    "e": torch.zeros(0, 3),
    "f": torch.arange(5),
}


def same(found, expected):
    return found.dtype == expected.dtype and torch.equal(found, expected)


def test_one_file_is_what_safetensors_itself_reads(tmp_path):
    save_sharded(tmp_path, TENSORS)
    assert os.listdir(tmp_path) == ["diffusion_pytorch_model.safetensors"]
    found = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], tensor) for name, tensor in TENSORS.items())


def test_files_have_the_permissions_of_new_files(tmp_path):
    save_sharded(tmp_path, TENSORS)
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_every_tensor_begins_at_a_multiple_of_its_elements(tmp_path):
    save_sharded(tmp_path, TENSORS)
    content = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_shards_hold_no_more_than_asked_and_the_index_finds_each_tensor(tmp_path):
    tensors = {str(i): torch.randn(10) for i in range(7)} | {"large": torch.randn(40)}
    save_sharded(tmp_path, tensors, max_shard_bytes=100)  # two of 40 bytes, or the large one
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"diffusion_pytorch_model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert index["metadata"]["total_size"] == 7 * 40 + 160
    for file in files:
        held = load_file(tmp_path / file)
        assert sum(t.nbytes for t in held.values()) <= 100 or list(held) == ["large"]
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        assert all(same(tensor, tensors[name]) for name, tensor in held.items())


def test_the_tensors_of_one_shard_are_made_at_a_time(tmp_path):
    alive = []

    def make(i):
        shards = {place // 2 for place, reference in enumerate(alive) if reference() is not None}
        assert shards <= {i // 2}
        tensor = torch.full((4,), float(i))
        alive.append(weakref.ref(tensor))
        return tensor

    makers = {str(i): (lambda i=i: make(i)) for i in range(6)}
    metas = dict.fromkeys(makers, torch.empty(4, device="meta"))
    save_sharded(tmp_path, LazyTensors(makers, meta=metas), max_shard_bytes=32)
    found = {
        name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()
    }
    assert [found[str(i)][0].item() for i in range(6)] == [0, 1, 2, 3, 4, 5]


def test_slices_of_one_tensor_are_counted_and_written_alone(tmp_path):
    parts = dict(zip("qkv", torch.randn(6, 5).chunk(3), strict=True))  # 40 bytes each
    save_sharded(tmp_path, parts, max_shard_bytes=80)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 120
    found = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert len(set(index["weight_map"].values())) == 2
    assert all(same(found[name], tensor) for name, tensor in parts.items())


def test_sat_layout_holds_what_was_given_and_no_more(tmp_path):
    whole = torch.randn(100, 100)
    save_sat_transformer(tmp_path / "t", {"x": whole[:1]}, tag="7", lora={"r": 1})
    assert (tmp_path / "t" / "latest").read_text() == "7"
    path = tmp_path / "t" / "7" / "mp_rank_00_model_states.pt"
    state = read_checkpoint(path)
    assert torch.equal(state["module"]["model.diffusion_model.x"], whole[:1])
    assert state["lora"] == {"r": 1}
    assert path.stat().st_size < whole.nbytes / 4


def test_a_view_is_copied_and_a_whole_tensor_is_not():
    whole = torch.randn(4, 4)
    assert own_storage(whole).data_ptr() == whole.data_ptr()
    assert own_storage(whole[1:]).untyped_storage().nbytes() == 48


def test_precision_changes_when_asked_and_overflow_is_named():
    tensors = {"w": torch.tensor([1.5, 7e4]), "n": torch.arange(2)}
    found = in_dtype(tensors, torch.bfloat16, where="file")
    assert found["w"].dtype is torch.bfloat16 and found["n"].dtype is torch.int64
    assert in_dtype(tensors, None, where="file") is tensors
    with pytest.raises(UserError, match="file: w has values beyond the range of float16"):
        in_dtype(tensors, torch.float16, where="file")["w"]


@pytest.mark.parametrize("save", [save_sharded, save_sat_transformer])
def test_a_failing_disk_is_one_sentence_and_leaves_nothing(tmp_path, save):
    failure = pytest.raises(UserError, match="out cannot be written: .*; free some space")
    with failure, full_disk():
        with new_folder(tmp_path / "out") as folder:
            save(folder, {"w": torch.zeros(4096)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [save_sharded, save_sat_transformer])
def test_values_that_are_not_finite_are_reported_and_written_as_they_are(tmp_path, caplog, write):
    write(tmp_path / "whole" if write is save_sat_transformer else tmp_path, TENSORS)
    assert not caplog.messages
    damaged = TENSORS | {"a": TENSORS["a"] * torch.nan, "b": TENSORS["b"] / 0}
    write(tmp_path / "damaged" if write is save_sat_transformer else tmp_path, damaged)
    (message,) = caplog.messages
    assert message.startswith("2 of 6 tensors contain values that are not finite (")
