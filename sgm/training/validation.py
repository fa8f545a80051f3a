"""How good a model in training is: a loss that can be compared, and videos to look at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sgm.data.loader import VALIDATION, SeededDataset, checked_batches, collate
from sgm.distributed import data_parallel_rank_and_size
from sgm.files import make_output_folder, replacing
from sgm.modules.diffusionmodules.discretizer import NUM_TIMESTEPS
from sgm.modules.diffusionmodules.sigma_sampling import NoiseLevels
from sgm.pipeline import CallDefaults, CogVideoX
from sgm.preflight import allowed_num_frames, check_model_section, require_sizes
from sgm.progress import Progress
from sgm.prompts import Prompt
from sgm.seeds import derived_seed
from sgm.video import collect_frames, write_contact_sheet

if TYPE_CHECKING:
    from sgm.engine import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


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
        videos: further arguments of `ValidationVideos`.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        config: Any,
        **videos: Any,
    ) -> None:
        args = config.args
        self.dataset = dataset
        self.seed = args.seed
        self.batch_size = args.eval_batch_size
        self.num_batches = args.eval_iters
        # One is enough: it reads a batch while the device works on the one before.
        self.num_workers = min(args.num_workers, 1)
        self.videos = ValidationVideos(config, **videos)

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


# Texts → conditioning of as many samples, as `GeneralConditioner.encode` does it.
Embed = Callable[[Sequence[str]], dict[str, Tensor]]

# Where the data has no rate of its own.
_FPS = 8
# Linux allows 255 bytes for a name; suffixes and the mark of a partial file come on top.
_MAX_NAME_BYTES = 200


class ValidationVideos:
    """Makes ``{folder}/validation/{iteration}/{number}_{prompt}.mp4`` and ``.png``.

    The PNG is a contact sheet. That of iteration 0, before training, is put above every later one.
    Noise is that of sample_video.py for a file of these prompts, one a line.

    Args:
        config: args.seed and args.only_log_video_latents, the `model` section for the videos' size
            (the largest that the network takes) and the `data` section for their rate.
        folder: the run's.
        prompts: what to make; may be empty.
        embed: gives a prompt's conditioning.
        lockstep: all processes must run the network together, since each has a part of its
            weights (ZeRO-3). Else they share the prompts out.
    """

    def __init__(
        self,
        config: Any,
        *,
        folder: Path,
        prompts: Sequence[str],
        embed: Embed,
        lockstep: bool = False,
    ) -> None:
        self.only_latents = config.args.only_log_video_latents
        self.model = config.model
        self.defaults = CallDefaults(
            shape=_sample_shape(config.model),
            fps=(config.data.get("params") or {}).get("fps", _FPS),
            seed=config.args.seed,
        )
        self.folder = folder / "validation"
        self.prompts = list(prompts)
        self.embed = embed
        self.lockstep = lockstep

    def make(self, engine: SATVideoDiffusionEngine, iteration: int) -> list[Path]:
        """All videos at `iteration`, with the engine in evaluation mode, without gradients.

        Returns:
            The files that this process wrote.

        Raises:
            UserError: a file cannot be written.
        """
        if self.prompts and engine.sampler is None:
            logger.info("no validation videos: model.sampler_config is absent")
            self.prompts = []  # said once
        rank, world_size = (0, 1) if self.lockstep else data_parallel_rank_and_size()
        own = list(enumerate(self.prompts))[rank::world_size]
        if not own:
            return []
        writes = not self.lockstep or data_parallel_rank_and_size()[0] == 0
        folder = self.folder / f"{iteration:06d}"
        if writes:
            make_output_folder(folder)
        made = []
        pipe = CogVideoX(engine, self.model, self.defaults, embed=self.embed)
        with Progress(len(own) * engine.sampler.num_steps) as progress:
            for number, prompt in own:
                for step in pipe.stream(prompt, index=number, decode=False):
                    progress.step(f"validation video {number}")
                    latents = step.latents
                if not writes:
                    continue
                if bool(latents.isfinite().all()):
                    made.append((folder / _file_name(number, prompt), latents))
                else:
                    progress.say(f"validation video {number} is left out: it is not finite")
            # The autoencoder may have to be loaded for it: once, when the sampling is over.
            written = self._write(pipe, made) if made else []
            for path in written:
                progress.say(str(path))
        return written

    def _write(self, pipe: CogVideoX, videos: Sequence[tuple[Path, Tensor]]) -> list[Path]:
        """Files of videos, each a path without suffix and latents (1, t, c, h, w)."""
        written, left = [], list(videos)
        if not self.only_latents:
            try:
                with pipe.engine.loaded_first_stage():
                    while left:
                        written += self._decode(pipe, *left[0])
                        del left[0]
            except torch.cuda.OutOfMemoryError:
                logger.warning(
                    "too little memory to decode validation videos, so their latents are kept "
                    "instead; with only_log_video_latents: true none is decoded"
                )
        for stem, latents in left:
            path = stem.with_name(f"{stem.name}.safetensors")
            with replacing(path) as partial:
                save_file({"latents": latents.cpu()}, partial, _latents_metadata(pipe.engine))
            written.append(path)
        return written

    def _decode(self, pipe: CogVideoX, stem: Path, latents: Tensor) -> list[Path]:
        """The mp4 and the contact sheet of one video."""
        mp4, sheet = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".png"))
        base = self.folder / f"{0:06d}" / sheet.name
        frames = collect_frames(pipe.decode(latents), mp4, fps=self.defaults.fps)
        write_contact_sheet(frames, sheet, above=base if base != sheet else None)
        return [mp4, sheet]


def _latents_metadata(engine: SATVideoDiffusionEngine) -> Mapping[str, str]:
    """What one must know to decode the latents."""
    return {"scale_factor": repr(engine.scale_factor), "layout": "b t c h w"}


def _sample_shape(model: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Shape (t, c, h, w) of the longest and largest latents that the network takes."""
    params = check_model_section(model)
    sizes = ("in_channels", "latent_height", "latent_width")
    require_sizes(params, ("num_frames", *sizes))
    return (allowed_num_frames(params)[-1], *(params[key] for key in sizes))


def _file_name(number: int, prompt: str) -> str:
    """``{number}_{prompt}``, short enough for every suffix."""
    name = Prompt(line=number, text=prompt).folder_name
    return name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").rstrip(" ._")
