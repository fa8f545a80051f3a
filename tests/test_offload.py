"""Offloaded weights; here both places are host memory, told apart by their addresses."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from sgm.offload import OffloadedWeights, host_copy, move_to_host, stream_weights


class Tied(nn.Module):
    """Two Linears with one weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.rand(8))

    def forward(self, x):
        return self.second(self.first(x) + self.table)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Tied().requires_grad_(False)


X = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))


def places(module):
    return [tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]]


def test_loaded_weights_are_elsewhere_equal_and_shared_as_before(module):
    tensors, homes, expected = [*module.parameters(), *module.buffers()], places(module), module(X)
    with OffloadedWeights(module, "cpu"):
        assert not set(places(module)) & set(homes)
        assert module.first.weight.data_ptr() == module.second.weight.data_ptr()
        assert torch.equal(module(X), expected)
    assert places(module) == homes
    same = zip(tensors, [*module.parameters(), *module.buffers()], strict=True)
    assert all(before is after for before, after in same)


def test_loading_may_change_the_type_but_not_the_home(module):
    def dtype_of(name):
        return torch.float64 if name == "first.weight" else torch.bfloat16

    with OffloadedWeights(module, "cpu", dtype_of=dtype_of):
        assert module.first.weight.dtype == torch.float64
        assert module.table.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}


def test_weights_are_home_again_after_a_failure_within(module):
    homes = places(module)
    with pytest.raises(ZeroDivisionError), OffloadedWeights(module, "cpu"):
        raise ZeroDivisionError
    assert places(module) == homes


def test_weights_are_home_again_if_only_some_of_them_arrive(module, monkeypatch):
    homes, copied = places(module), []

    def fail_at_the_third(home, *_, **__):
        copied.append(home)
        if len(copied) == 3:
            raise torch.OutOfMemoryError
        return home.clone()

    monkeypatch.setattr("sgm.offload._copied", fail_at_the_third)
    with pytest.raises(torch.OutOfMemoryError), OffloadedWeights(module, "cpu"):
        pass
    assert places(module) == homes and len(copied) == 3


def test_moving_to_the_host_keeps_values_layout_and_objects(module):
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    weight, copy, strides = conv.weight, conv.weight.detach().clone(), conv.weight.stride()
    move_to_host(conv)
    assert conv.weight is weight and torch.equal(weight, copy) and weight.stride() == strides


def test_a_host_copy_is_another_tensor():
    x = torch.rand(2, 3, 4).transpose(0, 1)
    copy = host_copy(x)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    assert copy.stride() == x.stride()


def test_compiled_code_stays_valid_over_several_loads(module):
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter)
    move_to_host(module)
    expected = module(X)
    for _ in range(3):
        with OffloadedWeights(module, "cpu"), torch.no_grad():
            assert torch.equal(compiled(X), expected)
    assert counter.frame_count == 1


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(Tied() for _ in range(3))).requires_grad_(False)


def test_streamed_modules_have_their_weights_one_at_a_time_and_give_the_same(stack):
    expected, homes = stack(X), [places(part) for part in stack]
    stream_weights(stack, "cpu")
    seen = []

    def look(*_):
        seen.append([places(part) == home for part, home in zip(stack, homes, strict=True)])

    for part in stack:
        part.second.register_forward_pre_hook(look)
    assert torch.equal(stack(X), expected)
    assert seen == [[False, True, True], [True, False, True], [True, True, False]]
    assert [places(part) for part in stack] == homes


def test_an_interrupted_module_leaves_no_weights_behind(stack):
    def interrupt(*_):
        raise KeyboardInterrupt

    homes = [places(part) for part in stack]
    stream_weights(stack, "cpu")
    stack[1].second.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stack(X)
    assert [places(part) for part in stack] == homes


def test_a_streamed_module_that_fails_leaves_no_weights_behind(stack):
    homes = [places(part) for part in stack]
    stream_weights(stack, "cpu")
    with pytest.raises(RuntimeError, match="shape"):
        stack(torch.rand(3, 7))
    assert [places(part) for part in stack] == homes
