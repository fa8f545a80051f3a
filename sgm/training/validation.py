"""Validate a model during training: compute a loss that is comparable across runs, make videos."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sgm.config import Config, SamplingArgs
from sgm.data.loader import VALIDATION, SeededDataset, checked_batches
from sgm.distributed import data_parallel_rank_and_size
from sgm.files import make_output_folder, replacing
from sgm.modules.diffusionmodules.discretizer import NUM_TIMESTEPS, NoiseLevels
from sgm.pipeline import CogVideoX
from sgm.preflight import check_model_section
from sgm.progress import Progress
from sgm.prompts import Prompt
from sgm.seeds import derived_seed
from sgm.video import collect_frames, write_contact_sheet

if TYPE_CHECKING:
    from sgm.engine import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


NUM_QUARTERS = 4
_QUARTER = NUM_TIMESTEPS // NUM_QUARTERS

# Kinds of random draws, which are part of the seeds. Kinds 0 to 3: noise level and noise of a
# quarter.
_ENCODING, _ITEM = NUM_QUARTERS, NUM_QUARTERS + 1

# Prompts → conditioning of one sample per prompt, as returned by `GeneralConditioner.encode`.
Embed = Callable[[Sequence[str]], dict[str, Tensor]]

_FPS = 8  # if the `data` section has no fps
# Linux allows 255 bytes for a file name. The rest is for suffixes, also of a partial file.
_MAX_NAME_BYTES = 200


class Validation:
    """Computes the loss on validation data and makes videos. Neither affects the training.

    The loss is the training loss. For each sample it is computed at one noise level in each quarter
    of the timesteps. Noise level and noise depend only on `args.seed`, the sample's index and the
    quarter, and are drawn on the CPU. Therefore losses are comparable across runs, batch sizes,
    numbers of processes and devices. All processes compute the same loss.

    Videos are written to ``{folder}/validation/{iteration}/{number}_{prompt}.mp4``, each with a
    contact sheet ``.png``. For comparison, each later sheet shows the sheet of iteration 0 (before
    training) at the top. The noise equals the noise of sample_video.py for an input file with one
    of `prompts` per line.

    Args:
        dataset: the validation data. The first `eval_iters` batches of `eval_batch_size` are used.
            Without a dataset, no loss is computed.
        config: its `args`; its `model` section, because videos have the largest size that the
            network accepts; its `data` section, for the frame rate of the videos.
        folder: the run's folder.
        prompts: the prompts of the videos; may be empty.
        embed: returns the conditioning of prompts.
        lockstep: True if all processes must run the network together, because each holds only a
            part of the weights (ZeRO-3). If False, the prompts are split among the processes.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        config: Config,
        *,
        folder: Path,
        prompts: Sequence[str],
        embed: Embed,
        lockstep: bool = False,
    ) -> None:
        self.dataset = dataset
        self.args = config.args
        self.model = config.model
        self.fps = (config.data.get("params") or {}).get("fps", _FPS)
        self.sampling = SamplingArgs(
            seed=config.args.seed,
            sampling_num_frames=max(check_model_section(config.model).lengths),
        )
        self.folder = folder / "validation"
        self.prompts = list(prompts)
        self.embed = embed
        self.lockstep = lockstep

    def loss(self, engine: SATVideoDiffusionEngine) -> dict[str, float]:
        """Return mean losses: ``loss`` overall, and ``loss 0-249`` … ``loss 750-999`` by timestep.

        Raises:
            UserError: the data cannot be read.
        """
        if self.dataset is None:
            return {}
        losses: list[list[Tensor]] = [[] for _ in range(NUM_QUARTERS)]
        first = 0
        with evaluating(engine):
            for batch in self._batches(self.dataset):
                # Encoding draws random numbers on the model's device, so devices differ a little.
                torch.manual_seed(self._seed(_ENCODING, first))
                latents, cond = engine.get_input(batch)
                for quarter in range(NUM_QUARTERS):
                    levels, noise = self._draw(engine, latents, quarter, first=first)
                    per_sample = engine.loss_fn.at_levels(
                        *(engine.model, engine.denoiser, latents.float(), cond),
                        levels=levels,
                        noise=noise,
                    )
                    losses[quarter].append(per_sample.double().cpu())
                first += len(latents)
        by_quarter = [float(torch.cat(quarter).mean()) for quarter in losses]
        names = [f"loss {q * _QUARTER}-{(q + 1) * _QUARTER - 1}" for q in range(NUM_QUARTERS)]
        mean = sum(by_quarter) / NUM_QUARTERS
        return {"loss": mean, **dict(zip(names, by_quarter, strict=True))}

    def _seed(self, kind: int, index: int) -> int:
        return derived_seed(self.args.seed, VALIDATION, kind, index)

    def _batches(self, dataset: Dataset) -> Iterator[dict[str, Any]]:
        size = self.args.eval_batch_size
        total = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__
        count = min(total, self.args.eval_iters * size)
        keys = [(index, self._seed(_ITEM, index)) for index in range(count)]
        loader = DataLoader(
            SeededDataset(dataset),
            batch_sampler=[keys[i : i + size] for i in range(0, count, size)],
            # One worker is enough: it reads a batch while the device computes the previous one.
            num_workers=min(self.args.num_workers, 1),
        )
        return checked_batches(loader)

    def _draw(
        self, engine: SATVideoDiffusionEngine, latents: Tensor, quarter: int, *, first: int
    ) -> tuple[NoiseLevels, Tensor]:
        """Draw noise levels (b,) from a quarter of their range, and noise (b, t, c, h, w).

        `first` is the index of the batch's first sample in the dataset.
        """
        schedule = engine.loss_fn.sigma_sampler.schedule
        # Timesteps are evenly spaced from 0 to 999.
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

    def make_videos(self, engine: SATVideoDiffusionEngine, iteration: int) -> list[Path]:
        """Sample and write the videos of all prompts at `iteration`.

        Returns:
            The files that this process wrote.

        Raises:
            UserError: a file cannot be written.
        """
        if self.prompts and engine.sampler is None:
            logger.info("no validation videos are made because model.sampler_config is missing")
            self.prompts = []  # log this only once
        rank, world_size = data_parallel_rank_and_size()
        own = list(enumerate(self.prompts))
        if not self.lockstep:
            own = own[rank::world_size]
        if not own:
            return []
        writes = rank == 0 or not self.lockstep
        folder = self.folder / f"{iteration:06d}"
        if writes:
            make_output_folder(folder)
        made = []
        pipe = CogVideoX(engine, self.model, self.sampling, embed=self.embed)
        with evaluating(engine), Progress(len(own) * engine.sampler.num_steps) as progress:
            for number, prompt in own:
                for step in pipe.stream(prompt, index=number, decode=False):
                    progress.step(f"validation video {number}")
                    latents = step.latents
                if not latents.isfinite().all():
                    progress.say(f"validation video {number} is skipped: latents are not finite")
                elif writes:
                    name = Prompt(line=number, text=prompt).folder_name.encode()[:_MAX_NAME_BYTES]
                    made.append((folder / name.decode(errors="ignore").rstrip(" ._"), latents))
            # Decode after all sampling, because the autoencoder may have to be loaded first.
            written = self._write(pipe, made) if made else []
            for path in written:
                progress.say(str(path))
        return written

    def _write(self, pipe: CogVideoX, videos: Sequence[tuple[Path, Tensor]]) -> list[Path]:
        """Write the mp4 and contact sheet of each video, or its latents if it cannot be decoded.

        Each item of `videos` is a path without suffix and latents (1, t, c, h, w). Latents are also
        written if `only_log_video_latents` is set. Return the written files.
        """
        written, left = [], list(videos)
        if not self.args.only_log_video_latents:
            try:
                with pipe.engine.loaded_first_stage():
                    while left:
                        stem, latents = left[0]
                        mp4, sheet = (stem.with_name(stem.name + end) for end in (".mp4", ".png"))
                        before = self.folder / f"{0:06d}" / sheet.name
                        frames = collect_frames(pipe.decode(latents), mp4, fps=self.fps)
                        write_contact_sheet(frames, sheet, above=before)
                        written += [mp4, sheet]
                        del left[0]
            except torch.cuda.OutOfMemoryError:
                logger.warning(
                    "not enough GPU memory to decode the validation videos, so their latents are "
                    "saved instead; set only_log_video_latents: true to skip decoding"
                )
        for stem, latents in left:
            path = stem.with_name(f"{stem.name}.safetensors")
            # Values that decoding the latents needs.
            metadata = {"scale_factor": repr(pipe.engine.scale_factor), "layout": "b t c h w"}
            with replacing(path) as partial:
                save_file({"latents": latents.cpu()}, partial, metadata)
            written.append(path)
        return written


@contextmanager
def evaluating(engine: torch.nn.Module) -> Iterator[None]:
    """Put `engine` in evaluation mode and disable gradients within this context.

    Afterwards the mode of each module and the states of the random generators are restored.
    """
    modes = [(module, module.training) for module in engine.modules()]
    device = next(engine.parameters()).device
    engine.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
