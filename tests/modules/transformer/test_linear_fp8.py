"""Float8 products: how far they are rounded, which Linears have them, what a GPU is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from arguments import parse_config
from sgm.config import SamplingArgs
from sgm.errors import UserError
from sgm.loading import load_engine
from sgm.models.transformer import DiffusionTransformer
from sgm.modules.transformer.linear import (
    FLOAT8,
    Fp8Linear,
    check_fp8,
    quantize_linears,
    to_float8,
)
from tests.lora_models import build

CONFIG = "configs/cogvideox_tiny_infer.yaml"


def predict(network: DiffusionTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 16, 8, 12, generator=generator)
    context = torch.randn(2, 10, 48, generator=generator)
    with torch.no_grad():
        return network(x, torch.tensor([700, 20]), context=context)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_rows_are_rounded_to_four_bits_with_a_scale_of_their_own() -> None:
    torch.manual_seed(0)
    rows = torch.rand(5, 32) + 0.5
    rows *= torch.tensor([[1e-6], [1.0], [-1.0], [3e4], [0.0]])
    factors, scale = to_float8(rows)
    assert factors.dtype == FLOAT8 and factors.float().abs().amax(-1).tolist() == [448.0] * 4 + [0]
    # Half a unit of the fourth bit, 2^-4 at most, of every value; nothing is below the format here.
    torch.testing.assert_close(factors.float() * scale, rows, rtol=2**-4, atol=0)


def test_products_of_what_float8_holds_are_exact() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 32)
    x = torch.randint(-1, 2, (2, 5, 16)) * 1.75  # 1.75 / 448 is 2^-8, a scale that rounds nothing
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-7, 8, (32, 16)))
        linear.weight[:, 0] = 7.0  # 7 / 448 is 2^-6
        linear.bias.copy_(torch.randint(-9, 10, (32,)))
    quantized = Fp8Linear(linear)
    expected = linear(x).bfloat16().float()
    assert torch.equal(quantized(x), expected)
    half = quantized(x.half())
    assert half.dtype == torch.float16 and torch.equal(half.float(), expected)


def test_values_that_are_not_finite_stay_so() -> None:
    x = torch.ones(3, 16)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    found = Fp8Linear(nn.Linear(16, 16))(x).isfinite().all(-1)
    assert found.tolist() == [False, False, True]


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_both_linears_of_each_mlp_are_replaced(lora: dict[str, Any] | None) -> None:
    network = build(lora)
    expected = predict(network)
    names = {name for name, _ in network.named_parameters()}
    quantize_linears(network)
    found = [name for name, part in network.named_modules() if isinstance(part, Fp8Linear)]
    assert len(found) == 2 * len(network.transformer.layers)
    scales = {f"{name}.scale" for name in found}
    assert {name for name, _ in network.named_parameters()} == names | scales
    # Factors are off by up to 2^-4, so their sums by a few hundredths at most.
    assert 1e-3 < relative_error(predict(network), expected) < 0.1


def test_blocks_compile_to_one_graph(compiled_graphs: dict[str, int]) -> None:
    network = build()
    quantize_linears(network)
    expected = predict(network)
    network.compile_blocks()
    found = predict(network)
    assert compiled_graphs["unique_graphs"] == 1
    # A sum in another order can round to the next float8, of two values 2^-3 apart.
    assert relative_error(found, expected) < 0.02


def test_a_gpu_is_asked_for_a_product_of_the_form_it_has() -> None:
    # PyTorch checks here what the product on a GPU checks: layouts, sizes and types.
    with FakeTensorMode():
        weight = torch.empty(96, 32, device="cuda", dtype=torch.float16)
        bias = torch.empty(96, device="cuda", dtype=torch.float16)
        linear = Fp8Linear(SimpleNamespace(weight=weight, bias=bias))
        x = torch.empty(2, 7, 32, device="cuda", dtype=torch.float16)
        product = linear(x)
    assert (product.shape, product.dtype) == ((2, 7, 96), torch.float16)


@pytest.mark.parametrize(("capability", "works"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_without_float8_are_refused(
    capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU")
    check_fp8(torch.device("cpu"))
    if works:
        check_fp8(torch.device("cuda"))
    else:
        with pytest.raises(UserError, match="the GPU does not support float8"):
            check_fp8(torch.device("cuda"))


def test_the_flag_of_sampling_quantizes_the_transformer() -> None:
    config = parse_config(SamplingArgs, "", ["--base", CONFIG, "--fp8", "--bf16"])
    engine = load_engine(config, torch.device("cpu"))
    layer = engine.model.diffusion_model.transformer.layers[-1]
    assert isinstance(layer.mlp.dense_4h_to_h, Fp8Linear)
    assert engine.model.diffusion_model.dtype == torch.bfloat16
