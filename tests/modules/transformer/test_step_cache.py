"""What is reused between steps, and that nothing changes where nothing is."""

import pytest
import torch

from sgm.models.transformer import DiffusionTransformer
from sgm.modules.transformer.step_cache import StepCacheMixin, cached_steps
from tests.models.conftest import fill_with_noise, small_transformer_config

SIZES = {"x": (1, 3, 16, 8, 12), "context": (1, 10, 48)}


@pytest.fixture(scope="module")
def network():
    network = DiffusionTransformer(**small_transformer_config(num_layers=3)).eval()
    fill_with_noise(network)
    return network


def run(network, *timesteps):
    """The predictions of a run in which only the timestep changes."""
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(size, generator=generator) for size in SIZES.values())
    with torch.no_grad():
        return [network(x, torch.tensor([t]), context=context) for t in timesteps]


@pytest.mark.parametrize("threshold", [0.0, 1e-9])
def test_steps_that_differ_too_much_are_computed_to_the_bit(network, threshold):
    plain = run(network, 900, 500, 100)
    with cached_steps(network, threshold):
        cached = run(network, 900, 500, 100)
    assert all(map(torch.equal, cached, plain))


def test_a_step_that_differs_little_is_close_to_its_own_result(network):
    first, second = run(network, 500, 499)
    with cached_steps(network, 0.5):
        whole, reused = run(network, 500, 499)
    assert torch.equal(whole, first) and not torch.equal(reused, second)
    # The first block, the time and the head are this step's own: closer than the last result.
    assert (reused - second).norm() < (first - second).norm()


def test_nothing_is_left_of_a_run(network):
    names = list(network.state_dict())
    with pytest.raises(KeyError), cached_steps(network, 0.5):
        run(network, 500)
        raise KeyError
    assert list(network.state_dict()) == names and "step_cache" not in network.mixins
    assert not network.transformer.hooks  # which would keep the tensors alive
    plain = run(network, 499)
    with cached_steps(network, 0.5):
        assert torch.equal(run(network, 499)[0], plain[0])  # not the run before's blocks


def test_the_change_is_measured_against_the_last_whole_step():
    """Small changes add up: steps that creep away from it are computed again."""
    calls = []

    def block(tokens, mask, *, layer_id, added):
        calls.append(layer_id)
        return tokens + (added if layer_id == 0 else 10.0 * layer_id)

    mixin, tokens = StepCacheMixin(0.25, 3), torch.zeros(1, 2, 4)
    results = []
    for added in (1.0, 1.2, 1.4, 1.5):
        after = tokens
        for layer in range(3):
            after = mixin.layer_forward(after, None, old_impl=block, layer_id=layer, added=added)
        results.append(after.mean().item())
    # 1.2 is within 25% of 1; 1.4 is not (though of 1.2); 1.5 is within 25% of 1.4.
    assert calls == [0, 1, 2, 0, 0, 1, 2, 0]
    assert results == pytest.approx([31.0, 31.2, 31.4, 31.5])
