"""How good a model in training is: a loss that can be compared, and videos to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sgm.inference.seeds import derived_seed
from sgm.modules.diffusionmodules.discretizer import NUM_TIMESTEPS
from sgm.modules.diffusionmodules.sigma_sampling import NoiseLevels
from sgm.training.batches import checked_batches, collate
from sgm.training.seeding import VALIDATION, SeededDataset
from sgm.training.validation_videos import Embed, ValidationVideos

if TYPE_CHECKING:
    from diffusion_video import SATVideoDiffusionEngine

NUM_QUARTERS = 4
_QUARTER = NUM_TIMESTEPS // NUM_QUARTERS

# What is drawn: for a quarter's noise level and noise the quarter; for the others these numbers.
_ENCODING, _ITEM = NUM_QUARTERS, NUM_QUARTERS + 1


class Validation:
    """Loss on validation data and videos of validation prompts, without a trace in the training.

    The loss is that of training at one noise level in each quarter of the timesteps for each
    sample. Level and noise depend on `args.seed`, the sample's place in the data and the quarter
    alone, and are drawn on the CPU: figures of other runs, batch sizes, numbers of processes and
    devices can be compared with each other. All processes compute the same.

    Args:
        dataset: its first `eval_iters` batches of `eval_batch_size` are used; None: no loss.
        config: args, and the sections `model` and `data`.
        folder: the run's; see `ValidationVideos`, and there for the rest.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        config: Any,
        *,
        folder: Path,
        prompts: Sequence[str],
        embed: Embed,
        lockstep: bool = False,
    ) -> None:
        args = config.args
        self.dataset = dataset
        self.seed = args.seed
        self.batch_size = args.eval_batch_size
        self.num_batches = args.eval_iters
        # One is enough: it reads a batch while the device works on the one before.
        self.num_workers = min(args.num_workers, 1)
        self.videos = ValidationVideos(
            config, folder=folder, prompts=prompts, embed=embed, lockstep=lockstep
        )

    def loss(self, engine: SATVideoDiffusionEngine) -> dict[str, float]:
        """Mean losses: ``loss`` over all, and ``loss 0-249`` … ``loss 750-999`` by timestep.

        Raises:
            UserError: the data cannot be read.
        """
        if self.dataset is None:
            return {}
        losses, first = [], 0
        with evaluating(engine):
            for batch in self._batches():
                # What encoding draws is on the model's device and differs a little between kinds.
                torch.manual_seed(self._seed(_ENCODING, first))
                latents, cond = engine.get_input(batch)
                losses.append(self._quarters(engine, latents, cond, first=first))
                first += len(latents)
        by_quarter = torch.cat(losses, dim=1).mean(dim=1).tolist()  # NUM_QUARTERS
        names = [f"loss {q * _QUARTER}-{(q + 1) * _QUARTER - 1}" for q in range(NUM_QUARTERS)]
        mean = sum(by_quarter) / NUM_QUARTERS
        return {"loss": mean, **dict(zip(names, by_quarter, strict=True))}

    def make_videos(self, engine: SATVideoDiffusionEngine, iteration: int) -> list[Path]:
        """Videos of the validation prompts; see `ValidationVideos.make`."""
        with evaluating(engine):
            return self.videos.make(engine, iteration)

    def _seed(self, kind: int, place: int) -> int:
        return derived_seed(self.seed, VALIDATION, kind, place)

    def _batches(self) -> Iterator[dict[str, Any]]:
        count = min(len(self.dataset), self.num_batches * self.batch_size)
        keys = [(index, self._seed(_ITEM, index)) for index in range(count)]
        loader = DataLoader(
            SeededDataset(self.dataset),
            batch_sampler=[keys[i : i + self.batch_size] for i in range(0, count, self.batch_size)],
            num_workers=self.num_workers,
            collate_fn=collate,
        )
        return checked_batches(loader)

    def _quarters(
        self,
        engine: SATVideoDiffusionEngine,
        latents: Tensor,
        cond: dict[str, Tensor],
        *,
        first: int,
    ) -> Tensor:
        """Losses (NUM_QUARTERS, b), float64, on the CPU; `first` is the first sample's place."""
        losses = []
        for quarter in range(NUM_QUARTERS):
            levels, noise = self._draw(engine, latents, quarter, first=first)
            per_sample = engine.loss_fn.at_levels(
                engine.model, engine.denoiser, latents.float(), cond, levels=levels, noise=noise
            )
            losses.append(per_sample.double().cpu())
        return torch.stack(losses)

    def _draw(
        self, engine: SATVideoDiffusionEngine, latents: Tensor, quarter: int, *, first: int
    ) -> tuple[NoiseLevels, Tensor]:
        """Noise levels (b,) of a quarter and noise (b, t, c, h, w) on the device of `latents`."""
        schedule = engine.loss_fn.sigma_sampler.schedule
        # Timesteps are evenly spaced; 1000 of them are the numbers from 0 to 999.
        num_levels = len(schedule.timesteps)
        low, high = (q * num_levels // NUM_QUARTERS for q in (quarter, quarter + 1))
        places, noise = [], []
        for index in range(len(latents)):
            generator = torch.Generator().manual_seed(self._seed(quarter, first + index))
            places.append(int(torch.randint(low, max(high, low + 1), (), generator=generator)))
            sample = latents[index : index + 1].to("cpu", torch.float32)  # (1, t, c, h, w)
            noise.append(engine.loss_fn.draw_noise(sample, generator=generator))
        levels = NoiseLevels(schedule.timesteps[places], schedule.alphas_cumprod_sqrt[places])
        return levels, torch.cat(noise).to(latents.device)


@contextmanager
def evaluating(engine: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random numbers come back."""
    modes = [(module, module.training) for module in engine.modules()]
    device = next(engine.parameters()).device
    engine.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
