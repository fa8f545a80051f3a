"""What tests of several folders share: a small text encoder and a small configuration."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from arguments import parse_config
from sgm.checkpoint.lora import lora_record
from sgm.checkpoint.transformer import MODEL_PREFIX, is_lora_matrix, load_transformer
from sgm.config import SamplingArgs
from sgm.util import instantiate_from_config
from tests.plain_attention import replace_kernels
from tools import make_random_weights
from tools.make_random_weights import write_t5

OLD_NAMES = Path(__file__).parent / "data" / "old_names.yaml"
TINY = Path(__file__).parents[1] / "configs" / "cogvideox_tiny_infer.yaml"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes share the tests: two, where there are two cores.

    None besides this one for single files and tests, which would wait for the others to start.
    """
    places = [Path(argument.partition("::")[0]) for argument in config.args]
    return 2 if all(map(Path.is_dir, places)) and len(os.sched_getaffinity(0)) > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    """Each of several processes has a core for itself, and so have the commands that it starts."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB, which writing meets as it meets a full disk.

    Only around the call that is tested: pytest writes to a file of its own where its output goes
    to one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 folder of width 64 with random weights."""
    folder = tmp_path_factory.mktemp("small") / "t5"
    torch.manual_seed(0)
    write_t5(folder, width=64, num_layers=1)
    return folder


@pytest.fixture
def small_model(t5_folder: Path) -> dict[str, Any]:
    """The `model` section of tests/data/old_names.yaml, to be changed at will."""
    model = parse_config(SamplingArgs, "", ["--base", str(OLD_NAMES)]).model
    embedder = model["conditioner_config"]["params"]["emb_models"][0]
    embedder["params"]["model_dir"] = str(t5_folder)
    return model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Arguments --base: the tiny configuration, cut down further, with random weights in place."""
    root = tmp_path_factory.mktemp("weights")
    config = OmegaConf.load(TINY)
    embedder = config.model.conditioner_config.params.emb_models[0]
    embedder.params.model_dir = str(root / "t5")
    config.model.network_config.params.num_layers = 1
    config.model.first_stage_config.params.ckpt_path = str(root / "3d-vae.pt")
    config.model.sampler_config.params.num_steps = 2
    config.args.load = str(root / "transformer")
    config.args.sampling_num_frames = 3
    path = root / "config.yaml"
    OmegaConf.save(config, path)
    make_random_weights.main(["--base", str(path), "--t5-layers", "1"])
    return ["--base", str(path)]


@pytest.fixture(scope="session")
def loras(base, tmp_path_factory):
    """A folder with two LoRA runs for these weights: one that never took a step, and another."""
    folder = tmp_path_factory.mktemp("loras")
    config = OmegaConf.to_container(OmegaConf.load(base[1]))
    node = config["model"]["network_config"]
    lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 2}}
    node["params"]["modules"]["lora_config"] = lora
    with torch.device("meta"):
        network = instantiate_from_config(node)
    load = config["args"]["load"]
    weights = load_transformer(network, load, dtype=torch.float32, device="cpu")
    for name in ("untrained", "trained"):
        (folder / name / "5").mkdir(parents=True)
        (folder / name / "latest").write_text("5")
        matrices = {MODEL_PREFIX + n: w for n, w in network.named_parameters() if is_lora_matrix(n)}
        state = {"module": matrices, "lora": lora_record(network, weights)}
        torch.save(state, folder / name / "5" / "mp_rank_00_model_states.pt")
        for layer in network.transformer.layers:
            for matrix in layer.attention.dense.matrix_B:
                matrix.data.fill_(1.0)
    return folder


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """PyTorch's counts of what is compiled, with ``unique_graphs``, from here on.

    Traced as always, but operators stay as they are; a break of the graph is an error.
    """
    compile_with = torch.compile

    def without_code_generation(function: Any, *, dynamic: bool, options: dict[str, Any]) -> Any:
        assert options.keys() <= set(torch._inductor.list_options())
        return compile_with(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", without_code_generation)
    torch.compiler.reset()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    return counts


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the kernels for a GPU, of which none is needed then, were given: see there."""
    return replace_kernels(monkeypatch)


@pytest.fixture
def run_interpreted(pytestconfig: pytest.Config) -> Callable[[str], CompletedProcess[str]]:
    """Runs code in which Triton's kernels are interpreted, on a CPU.

    In a process of its own, because Triton asks whether to interpret when it is imported.
    """

    def run(code: str) -> CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=pytestconfig.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
