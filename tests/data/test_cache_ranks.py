"""Two processes make one cache. This file is also the program that each of them runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed, nn

from arguments import parse_config
from sgm.config import TrainingArgs
from sgm.data import cache
from sgm.data.cache import Store, prepare_cache
from sgm.data.frames import ClipError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "cogvideox_tiny_sft.yaml")


class Clips:
    """Five clips with three captions; the last clip cannot be decoded."""

    def __init__(self, folder):
        self.clips = [folder / f"{index}.mp4" for index in range(5)]
        self.captions = ["one", "two", "three", "one", "one"]

    def frame_settings(self):
        return {"random_window": False}

    def read_clip(self, index, *, position):
        if index == 4:
            raise ClipError("it cannot be decoded")
        return torch.full((5, 3, 16, 24), float(index))


class Autoencoder(nn.Module):
    """Replaces the real one, whose packages take seconds to import."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, x, unregularized):
        return x[..., ::8, ::8], {}


class Conditioner(nn.Module):
    """Replaces the real one, too."""

    input_keys = ("txt",)

    def forward(self, batch):
        return {"crossattn": torch.tensor([[[float(len(text))]] for text in batch["txt"]])}


def work_as_rank(rank, folder):
    """Make this process's share, and write its keys and all items to a file."""
    cache.build_first_stage = lambda *_, **__: Autoencoder()
    cache.instantiate_from_config = lambda *_, **__: Conditioner()
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    written, write = [], Store.write

    def record(self, key, tensor):
        write(self, key, tensor)
        written.append(key)

    Store.write = record
    dataset = Clips(folder)
    settings = {"cache_dir": folder / "cache", "dtype": torch.float32, "device": "cpu"}
    model = parse_config(TrainingArgs, "", ["--base", CONFIG]).model
    items = prepare_cache([dataset], model, **settings, num_workers=1).dataset(dataset)
    got = [[float(tensor.mean()) for tensor in items[i].values()] for i in range(len(items))]
    (folder / f"{rank}.json").write_text(json.dumps([written, got]))


def test_two_processes_share_the_work_and_get_the_same(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.mp4").write_bytes(f"content {index}".encode())
    started = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(tmp_path)],
                stderr=subprocess.PIPE, env=environment, cwd=ROOT, text=True,
            )
        )  # fmt: skip
    logs = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    (first, got), (second, same) = results
    assert got == same == [[0, 3], [1, 3], [2, 5], [3, 3]]
    # Four latents and three embeddings, each made once, half by each process.
    assert not set(first) & set(second) and sorted([len(first), len(second)]) == [3, 4]
    assert "".join(logs).count("4.mp4 is skipped: it cannot be decoded") == 1


if __name__ == "__main__":
    work_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
