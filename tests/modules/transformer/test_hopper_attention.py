"""The attention kernels of this project: interpreted, compiled for a Hopper GPU, and on one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from sgm.modules.transformer import attention
from tests.plain_attention import written_out

pytest.importorskip("triton.experimental.gluon")

INTERPRETED = """
import torch
from sgm.modules.transformer import hopper_attention
from tests.plain_attention import written_out

hopper_attention.CAREFUL_PROGRAMS = 4  # so that one looks at several parts
generator = torch.Generator().manual_seed(0)
for num_queries, num_keys, scale in ((70, 100, 1.0), (130, 1, 1.0), (5, 131, 30.0)):
    query = scale * torch.randn(2, num_queries, 3, 64, generator=generator)
    key, value = torch.randn(2, 2, num_keys, 3, 64, generator=generator)
    expected, expected_sum = written_out(query.double(), key.double(), value.double())
    result, log_sum_exp = torch.zeros(2, num_queries, 3, 64), torch.zeros(2, 3, num_queries)
    num_parts = -(-num_queries // 64)
    broken = torch.randint(0, 2, (2, 3, num_parts), generator=generator, dtype=torch.int32)
    rows = (tensor.flatten(2).flatten(0, 1) for tensor in (query, key, value))
    tally = torch.zeros(2, dtype=torch.int64)
    hopper_attention.run_fallback((*rows, result, log_sum_exp), broken, tally, num_keys=num_keys)
    assert tally.tolist() == [broken.numel(), broken.sum()]
    is_done = broken.bool().repeat_interleave(64, dim=2)[..., :num_queries]
    assert 0 < is_done.sum() < is_done.numel()
    expected *= is_done.transpose(1, 2)[..., None]
    # Float32 rounding of means of numbers of about 1, and of scores of up to 300.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-4)
    expected_sum *= is_done
    torch.testing.assert_close(log_sum_exp.double(), expected_sum, rtol=1e-6, atol=1e-5)
print("agrees")
"""


def test_the_careful_kernel_computes_what_is_broken_and_nothing_else(
    run_interpreted: Callable[[str], CompletedProcess[str]],
) -> None:
    result = run_interpreted(INTERPRETED)
    assert result.stdout == "agrees\n", result.stderr


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_fast_kernel_compiles_and_keeps_its_numbers_in_registers(
    dtype: str, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from sgm.modules.transformer import hopper_attention as kernels

    shared = repr(kernels._SHARED)
    tiles = [f"tensordesc<{dtype}[{rows},64],{shared}>" for rows in (64, 128, 128)]
    types = [*tiles, f"*{dtype}", "*fp32", "*i32", "i32", "i32", "i32", "fp32"]
    signature = dict(zip(kernels._fast_kernel.arg_names, types, strict=True))
    source = GluonASTSource(kernels._fast_kernel, signature, {})
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    assert compiled.metadata.shared <= 227 * 1024
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = subprocess.run(
        [tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
    )
    # With 128 registers for each of 512 threads all are taken; they are shared out unevenly then.
    assert re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout) == [("128", "0")]


@pytest.fixture
def try_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """The trial of the kernel, as if there were a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "can_compile_kernels", lambda: True)
    attention._hopper_runs_on.cache_clear()
    yield partial(attention._hopper_runs_on, torch.device("cpu"), torch.float16)
    attention._hopper_runs_on.cache_clear()


@pytest.mark.usefixtures("kernel_calls")
def test_a_kernel_that_works_is_taken(
    try_kernel: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tally = torch.tensor([12, 6])  # as the trial leaves it
    monkeypatch.setattr(attention, "_tallies", {torch.device("cpu"): tally})
    with caplog.at_level("INFO"):
        assert try_kernel()
    assert caplog.messages == ["attention uses the Hopper kernel of this project"]
    assert attention.fallback_ratio() == 0


def test_a_kernel_that_fails_is_left_out_with_a_warning(
    try_kernel: Callable[[], bool], caplog: pytest.LogCaptureFixture
) -> None:
    assert not try_kernel()  # there is no GPU
    (record,) = caplog.records
    reason = record.message.removeprefix(
        "attention is slower, because the Hopper kernel does not work"
    )
    assert re.match(r": \w+", reason)
    assert "\n" not in reason


def test_a_kernel_with_other_results_is_left_out_with_a_warning(
    try_kernel: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attention, "hopper_attention", lambda q, k, v: (q.new_zeros(q.shape), q))
    assert not try_kernel()
    assert caplog.records[0].message.endswith(": its results differ from PyTorch's")


def test_a_lack_of_memory_says_nothing_about_the_kernel(
    try_kernel: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Tensor) -> NoReturn:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "hopper_attention", fail)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            try_kernel()


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        (((1, 4, 2, 32), (1, 4, 2, 32)), torch.float16),
        (((1, 0, 2, 64), (1, 4, 2, 64)), torch.float16),
        (((2, 4, 2, 64), (1, 4, 2, 64)), torch.float16),
        (((1, 4, 2, 64), (1, 4, 2, 64)), torch.float32),
    ],
)
def test_what_the_kernel_would_read_wrongly_is_refused(
    sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> None:
    from sgm.modules.transformer.hopper_attention import attend_on_hopper

    query, key = (torch.zeros(size, dtype=dtype) for size in sizes)
    with pytest.raises(AssertionError, match=r"\w"):
        attend_on_hopper(query, key, key, tally=torch.zeros(2, dtype=torch.int64))


def test_the_size_of_a_head_is_the_same_in_both_places() -> None:
    from sgm.modules.transformer.hopper_attention import HEAD_SIZE

    assert HEAD_SIZE.value == attention._HOPPER_HEAD_SIZE


# ---- on a GPU ----

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


def draw(batch: int, num_queries: int, num_keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of two heads."""
    generator = torch.Generator().manual_seed(0)
    sizes = (num_queries, num_keys, num_keys)
    tensors = [torch.randn(batch, n, 2, 64, generator=generator) for n in sizes]
    return [tensor.to("cuda", dtype) for tensor in tensors]


def check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Compare with the formula."""
    found, found_sum = attention.hopper_attention(query, key, value)
    expected, expected_sum = written_out(query.double(), key.double(), value.double())
    error = found.double() - expected
    # Weights and result are rounded, each by up to half a unit; PyTorch's attention differs by a
    # fifth to a third of a unit on average.
    unit = torch.finfo(found.dtype).eps
    assert error.norm() <= 0.5 * unit * expected.norm()
    assert error.abs().max() <= unit * value.abs().max()
    scale = max(expected_sum.abs().max().item(), 1)
    torch.testing.assert_close(found_sum.double(), expected_sum, rtol=0, atol=3e-6 * scale)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "num_queries", "num_keys"),
    [
        (1, 5, 5),
        (3, 1, 1),
        (1, 64, 128),
        (2, 193, 129),
        (1, 700, 226),
        (2, 226, 700),
        (1, 3000, 3000),
    ],
)
def test_gpu_result_is_within_the_rounding_of_its_type(
    batch: int, num_queries: int, num_keys: int, dtype: torch.dtype
) -> None:
    check(*draw(batch, num_queries, num_keys, dtype))


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [4, 40])
def test_gpu_result_where_scores_are_too_high_for_the_guess(
    monkeypatch: pytest.MonkeyPatch, scale: int, dtype: torch.dtype
) -> None:
    from sgm.modules.transformer import hopper_attention as kernels

    broken = []
    again = kernels.run_fallback

    def look(tensors: Sequence[Tensor], parts: Tensor, tally: Tensor, *, num_keys: int) -> None:
        broken.append(int((parts != 0).sum()))
        again(tensors, parts, tally, num_keys=num_keys)

    monkeypatch.setattr(kernels, "run_fallback", look)
    query, key, value = draw(1, 1000, 1000, dtype)
    attention.restart_tally()
    check(scale * query, scale * key, value)
    # Two heads with six tiles of three parts each.
    assert attention.fallback_ratio() == broken[-1] / 36
    # bfloat16 has room for scores that are higher by (128 + 5) ln 2 = 92.
    assert (broken[-1] > 0) == (dtype == torch.float16 or scale == 40)


@on_hopper
def test_gpu_result_of_one_sample_is_not_spoilt_by_the_next() -> None:
    query, key, value = draw(2, 300, 300, torch.float16)
    expected = attention.hopper_attention(query[:1], key[:1], value[:1])[0]
    value[1, 3] = torch.inf
    found = attention.hopper_attention(query, key, value)[0]
    # To the last bits: what the infinite value met is computed by the other kernel.
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=1e-3)
    assert not found[1].isfinite().any()


@on_hopper
def test_gpu_takes_tensors_that_are_parts_of_others() -> None:
    query, key, value = draw(2, 400, 400, torch.float16)
    whole = torch.cat([query, key, value], dim=2)
    parts = whole[:, 17:].split(2, dim=2)
    assert not parts[1].is_contiguous()
    check(*parts)


@on_hopper
def test_gpu_result_is_what_torch_compile_expects() -> None:
    checks = ("test_schema", "test_faketensor")
    inputs = tuple(draw(2, 300, 200, torch.float16))
    torch.library.opcheck(attention.hopper_attention, inputs, test_utils=checks)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_kernel_is_chosen(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    tokens = torch.zeros(1, device="cuda", dtype=dtype)
    with torch.no_grad():
        assert attention.list_kernels(tokens, head_size=64)[0] == "hopper"
    assert not caplog.records
