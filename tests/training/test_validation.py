"""Validation: a reproducible loss, and videos next to those from before training."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from sgm.modules import GeneralConditioner
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.modules.diffusionmodules.sampling import SampledStep
from sgm.seeds import sample_generator
from sgm.training.validation import Validation

DIFFUSION = "sgm.modules.diffusionmodules"
DISCRETIZATION = {
    "target": f"{DIFFUSION}.discretizer.ZeroSNRDDPMDiscretization",
    "params": {"shift_scale": 1.0},
}
SAMPLER = f"{DIFFUSION}.sigma_sampling.DiscreteSampling"
MODEL = {
    "network_config": {
        "params": {"num_frames": 9, "in_channels": 2, "latent_height": 2, "latent_width": 3}
    }
}
SHAPE = (1, 3, 2, 2, 3)  # b t c h w: nine video frames of 16 x 24 pixels


class Network(nn.Module):
    """Returns a multiple of its input and records its inputs."""

    diffusion_model = None

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.dropout = nn.Dropout(0.5)
        self.asked = []

    def forward(self, x, timesteps, cond):
        self.asked.append((x.clone(), timesteps.tolist()))
        return self.dropout(self.factor * x)


class Engine(nn.Module):
    """The parts of the engine that validation uses, in their simplest form."""

    def __init__(self, num_idx=1000, factor=0.0):
        super().__init__()
        self.model = Network(factor)
        self.denoiser = DiscreteDenoiser(
            num_idx,
            {"target": f"{DIFFUSION}.denoiser_weighting.EpsWeighting"},
            scaling_config={"target": f"{DIFFUSION}.denoiser_scaling.VideoScaling"},
            discretization_config=DISCRETIZATION,
        )
        params = {"num_idx": num_idx, "discretization_config": DISCRETIZATION}
        self.loss_fn = VideoDiffusionLoss({"target": SAMPLER, "params": params})
        self.conditioner = GeneralConditioner([{"input_key": "txt"}], with_embedders=False)
        self.sampler = SimpleNamespace(num_steps=1)
        self.scale_factor = 1.5
        self.calls = []
        self.loaded = False

    def get_input(self, batch):
        assert not self.training  # nothing is dropped
        spread = batch.get("spread", torch.zeros(()))
        return batch["mp4"] + spread * torch.randn(batch["mp4"].shape), {}

    def sample_steps(self, cond, uncond, shape, *, generator, sampler):
        assert not torch.is_grad_enabled() and not self.training
        self.calls.append((cond, uncond))
        latents = torch.randn(shape, generator=generator) * float(self.model.factor)
        yield SampledStep(0, latents, latents)

    @contextmanager
    def loaded_first_stage(self):
        self.loaded = True
        yield
        self.loaded = False

    def decode_first_stage(self, latents):
        for frames in ([0], [1, 1, 1, 1], [2, 2, 2, 2]):
            assert self.loaded
            pixels = latents[:, frames, :1].repeat_interleave(8, 3).repeat_interleave(8, 4)
            yield pixels.expand(-1, -1, 3, -1, -1)


def embed(prompts):
    return {"crossattn": torch.full((len(prompts), 2, 4), float(len(prompts[0])))}


def items(*values, **more):
    return [
        {"mp4": torch.full(SHAPE[1:], float(value)), "txt": f"a clip of {value}", **more}
        for value in values
    ]


@pytest.fixture
def build(tmp_path):
    """A function that makes a validation from data and arguments."""

    def make(dataset=None, *, prompts=(), lockstep=False, data=None, **args):
        args = {
            "seed": 1, "eval_batch_size": 1, "eval_iters": 9, "num_workers": 0,
            "only_log_video_latents": False,
        } | args  # fmt: skip
        config = SimpleNamespace(args=SimpleNamespace(**args), model=MODEL, data=data or {})
        return Validation(
            dataset, config, folder=tmp_path, prompts=prompts, embed=embed, lockstep=lockstep
        )

    return make


def test_the_loss_of_a_network_that_answers_zero_is_the_one_worked_out_by_hand(build):
    engine = Engine(num_idx=4)  # one noise level in each quarter
    engine.loss_fn.draw_noise = lambda x, generator: torch.zeros_like(x)
    # v = a noise - s x, a² + s² = 1; noise 0 and answer 0 leave s² x², with x² = (4 + 16) / 2.
    losses = build(items(2, 4), eval_batch_size=2).loss(engine)
    s2 = (1 - engine.loss_fn.sigma_sampler.schedule.alphas_cumprod_sqrt**2).tolist()
    expected = {
        "loss": 10 * sum(s2) / 4,
        "loss 0-249": 10 * s2[0],
        "loss 250-499": 10 * s2[1],
        "loss 500-749": 10 * s2[2],
        "loss 750-999": 10.0,  # no signal is left
    }
    assert losses == pytest.approx(expected, rel=1e-5)  # float32 in the loss


def test_each_sample_is_asked_once_in_each_quarter_with_noise_of_its_own(build):
    engine = Engine()
    build(items(0, 0, 0), eval_batch_size=2).loss(engine)
    quarters = [[t // 250 for t in timesteps] for _, timesteps in engine.model.asked]
    assert quarters == [[0, 0], [1, 1], [2, 2], [3, 3], [0], [1], [2], [3]]
    timesteps = [t for _, timesteps in engine.model.asked for t in timesteps]
    assert len({t % 250 for t in timesteps}) > 6
    # The clean latents are zeros, so the input is noise times its level.
    noise = torch.cat([x / x.std(dim=(1, 2, 3, 4), keepdim=True) for x, _ in engine.model.asked])
    distances = torch.pdist(noise.flatten(1))
    assert len(noise) == 12 and distances.min() > 1


def test_the_loss_repeats_whatever_the_batches_and_the_random_numbers_before(build):
    data = items(1, 2, 3, 4, 5)
    first = build(data).loss(Engine())
    torch.manual_seed(99)
    torch.rand(7)
    assert build(data).loss(Engine()) == first
    # Sums of different lengths differ in the last digits.
    assert build(data, eval_batch_size=3).loss(Engine()) == pytest.approx(first, rel=1e-6)
    assert build(data, num_workers=3).loss(Engine()) == first
    assert build(data, seed=2).loss(Engine())["loss"] != first["loss"]
    assert first["loss"] == pytest.approx(sum(list(first.values())[1:]) / 4)


class Windows(list):
    """Items with a random start, like windows of a long clip."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"mp4": item["mp4"] * torch.rand(())}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_data_and_encoding_draw_is_fixed_and_training_draws_on_undisturbed(build, num_workers):
    validation = build(Windows(items(1, 2, 3, spread=0.5)), num_workers=num_workers)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = validation.loss(Engine())
    assert torch.equal(torch.rand(3), expected)
    assert validation.loss(Engine()) == first
    assert build(items(1, 2, 3)).loss(Engine()) != first


def test_only_the_first_batches_are_used(build):
    first = build(items(1, 2, 3, 4)).loss(Engine())
    few = build(items(1, 2, 3, 4, 9, 9), eval_batch_size=2, eval_iters=2).loss(Engine())
    assert few == pytest.approx(first, rel=1e-6)


def test_every_modules_mode_comes_back_and_no_gradient_is_kept(build):
    engine = Engine(factor=1.0).train()
    engine.conditioner.eval()
    validation = build(items(1), prompts=["a"])
    seen = []
    engine.model.dropout.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    validation.loss(engine)
    validation.make_videos(engine, 0)
    assert set(seen) == {(False, False)}
    assert engine.training and engine.model.dropout.training and not engine.conditioner.training
    engine.get_input = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        validation.loss(engine)
    assert engine.training and engine.model.dropout.training


def test_without_data_there_is_no_loss(build):
    assert build(None).loss(Engine()) == {}


def test_videos_have_their_names_and_length_and_the_files_are_returned(build, tmp_path):
    prompts = ["a red/circle", "圆" * 200]
    engine = Engine(factor=1.0)
    paths = build(prompts=prompts, data={"params": {"fps": 16}}).make_videos(engine, 20)
    folder = tmp_path / "validation" / "000020"
    assert sorted(paths) == sorted(folder.iterdir()) and len(paths) == 4
    assert paths[:2] == [folder / "0_a red_circle.mp4", folder / "0_a red_circle.png"]
    assert paths[2].name.startswith("1_圆圆圆") and len(paths[2].name.encode()) <= 204
    assert iio.imread(paths[0], plugin="FFMPEG").shape == (9, 16, 24, 3)
    assert iio.immeta(paths[0], plugin="FFMPEG")["fps"] == 16
    cond, uncond = engine.calls[0]
    assert (cond["crossattn"] == len(prompts[0])).all() and (uncond["crossattn"] == 0).all()


def test_the_base_models_row_stands_above_every_later_one(build, tmp_path):
    engine = Engine(factor=0.25)
    _, base = build(prompts=["a"]).make_videos(engine, 0)
    with torch.no_grad():
        engine.model.factor.fill_(0.5)
    before = iio.imread(base)
    assert before.shape == (16, 6 * 24, 3)
    # A new process, as after resuming, adds a second row; another one adds no third row.
    for iteration in (10, 20):
        _, sheet = build(prompts=["a"]).make_videos(engine, iteration)
        after = iio.imread(sheet)
        assert after.shape == (32, 6 * 24, 3) and np.array_equal(after[:16], before)
        # The same noise with twice the contrast around grey; each is rounded to a whole number.
        wide, narrow = (part.astype(float) - 127.5 for part in (after[16:], after[:16]))
        inside = np.abs(narrow) < 60
        assert np.abs(wide - 2 * narrow)[inside].max() <= 1.5 and narrow.std() > 10


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", None])
def test_without_a_usable_sheet_of_the_base_model_there_is_one_row(build, tmp_path, content):
    if content is not None:
        (tmp_path / "validation" / "000000").mkdir(parents=True)
        (tmp_path / "validation" / "000000" / "0_a.png").write_bytes(content)
    _, sheet = build(prompts=["a"]).make_videos(Engine(), 10)
    assert iio.imread(sheet).shape == (16, 6 * 24, 3)


def test_only_latents_are_kept_where_that_is_asked_for(build, tmp_path):
    engine = Engine(factor=1.0)
    engine.loaded_first_stage = lambda: pytest.fail("the autoencoder is not needed")
    paths = build(prompts=["a", "b"], only_log_video_latents=True).make_videos(engine, 0)
    assert [path.name for path in paths] == ["0_a.safetensors", "1_b.safetensors"]
    with safe_open(paths[1], framework="pt") as file:
        latents = file.get_tensor("latents")
        assert json.loads(file.metadata()["scale_factor"]) == 1.5
    assert torch.equal(latents, torch.randn(SHAPE, generator=sample_generator(1, 1, 0)))


def test_too_little_memory_for_decoding_leaves_the_latents(build, caplog):
    engine = Engine()

    def fail(latents):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    engine.decode_first_stage = fail
    (path,) = build(prompts=["a"]).make_videos(engine, 0)
    assert (
        path.suffix == ".safetensors"
        and "not enough GPU memory to decode the validation videos" in caplog.text
    )
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_video_that_is_not_finite_is_left_out_and_the_next_one_made(build, caplog):
    caplog.set_level(logging.INFO)
    engine = Engine(factor=1.0)
    sample_steps = engine.sample_steps
    factors = iter([torch.nan, 1.0])

    def damaged(*args, **more):
        factor = next(factors)
        return (step._replace(x=step.x * factor) for step in sample_steps(*args, **more))

    engine.sample_steps = damaged
    paths = build(prompts=["a", "b"]).make_videos(engine, 0)
    assert [path.name for path in paths] == ["1_b.mp4", "1_b.png"]
    assert "validation video 0 is skipped: latents are not finite" in caplog.text


def test_without_a_sampler_it_is_said_once_that_there_are_no_videos(build, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    engine = Engine()
    engine.sampler = None
    validation = build(prompts=["a"])
    assert validation.make_videos(engine, 0) == validation.make_videos(engine, 10) == []
    assert caplog.text.count("sampler_config is missing") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lockstep", "rank", "sampled", "written"),
    [(False, 0, 2, [0, 2]), (False, 1, 1, [1]), (True, 0, 3, [0, 1, 2]), (True, 1, 3, [])],
)
def test_processes_share_the_prompts_or_sample_all_together(
    build, monkeypatch, lockstep, rank, sampled, written
):
    name = "sgm.training.validation.data_parallel_rank_and_size"
    monkeypatch.setattr(name, lambda: (rank, 2))
    engine = Engine()
    validation = build(prompts=["a", "b", "c"], lockstep=lockstep, only_log_video_latents=True)
    paths = validation.make_videos(engine, 0)
    assert len(engine.calls) == sampled
    assert [int(path.name[0]) for path in paths] == written


def test_the_autoencoder_is_loaded_once_for_all_videos(build):
    engine, loads = Engine(), []
    load = engine.loaded_first_stage
    engine.loaded_first_stage = lambda: loads.append(len(engine.calls)) or load()
    assert len(build(prompts=["a", "b", "c"]).make_videos(engine, 0)) == 6
    assert loads == [3]  # after all of them were sampled
