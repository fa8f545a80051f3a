"""Fixtures for the tests of the cache: clips that need no decoder, and a cache made of them."""

import shutil
from pathlib import Path

import pytest
import torch

from arguments import parse_config
from sgm.config import TrainingArgs
from sgm.data.cache import Store, prepare_cache
from sgm.data.frames import ClipError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "cogvideox_tiny_sft.yaml")


class StandIn:
    """Clips of any bytes that need no decoder: 5 frames of noise, seeded by the bytes."""

    def __init__(self, folder, *, fps=8, random_window=False):
        self.clips = sorted(folder.glob("*.mp4"))
        self.captions = [f"a red circle {path.stem}" for path in self.clips]
        self.settings = {"fps": fps, "random_window": random_window}
        self.positions = {}

    def __len__(self):
        return len(self.clips)

    def frame_settings(self):
        return dict(self.settings)

    def read_clip(self, index, *, position=0.0):
        self.positions[self.clips[index].name] = position
        content = self.clips[index].read_bytes()
        if b"damaged" in content:
            raise ClipError("it cannot be decoded")
        generator = torch.Generator().manual_seed(int.from_bytes(content[:8], "big"))
        return torch.rand(5, 3, 16, 24, generator=generator) * 2 - 1


def read_model():
    """The `model` section of the bundled model; tests may change it."""
    section = parse_config(TrainingArgs, "", ["--base", CONFIG]).model
    node = section["first_stage_config"]["params"]
    node["ckpt_path"] = str(ROOT / node["ckpt_path"])
    node = section["conditioner_config"]["params"]["emb_models"][0]["params"]
    node["model_dir"] = str(ROOT / node["model_dir"])
    return section


@pytest.fixture
def stand_in():
    return StandIn


@pytest.fixture
def model():
    return read_model()


def write_stand_ins(folder):
    """Three clips of the stand-in."""
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.mp4").write_bytes(f"content {index}".encode())
    return folder


@pytest.fixture
def clips(tmp_path):
    return write_stand_ins(tmp_path / "clips")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of the cache of these clips."""
    folder = tmp_path_factory.mktemp("finished")
    dataset = StandIn(write_stand_ins(folder / "clips"))
    settings = {"cache_dir": folder / "cache", "dtype": torch.float32, "device": "cpu"}
    prepare_cache([dataset], read_model(), texts=["a blue square"], **settings)
    return folder / "cache"


@pytest.fixture
def kept(finished, tmp_path):
    """A copy of it, in the folder that `prepare` uses."""
    return shutil.copytree(finished, tmp_path / "cache")


@pytest.fixture
def prepare(model, tmp_path):
    """Calls `prepare_cache` for one dataset on the CPU."""

    def call(dataset, *, model=model, **changes):
        settings = {"cache_dir": tmp_path / "cache", "dtype": torch.float32, "device": "cpu"}
        return prepare_cache([dataset], model, **(settings | changes))

    return call


@pytest.fixture
def made(monkeypatch):
    """The entries that are written: a list of (folder's name, key), in order."""
    written = []
    write = Store.write

    def record(store, key, tensor):
        write(store, key, tensor)
        written.append((store.folder.name, key))

    monkeypatch.setattr(Store, "write", record)
    return written


@pytest.fixture
def files():
    """Name → content of all files below a folder."""
    return lambda folder: {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
