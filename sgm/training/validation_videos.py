"""Videos that show what a model in training makes of fixed prompts and fixed noise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sgm.files import make_output_folder, replacing
from sgm.inference.progress import Progress
from sgm.inference.prompts import Prompt
from sgm.inference.request import allowed_num_frames, check_model_section, require_sizes
from sgm.inference.seeds import sample_generator
from sgm.inference.video_io import write_video
from sgm.modules.diffusionmodules.sigma_sampling import data_parallel_rank_and_size

if TYPE_CHECKING:
    from diffusion_video import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)

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
        self.seed = config.args.seed
        self.only_latents = config.args.only_log_video_latents
        self.shape = _sample_shape(config.model)
        self.fps = (config.data.get("params") or {}).get("fps", _FPS)
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
        with Progress(len(own) * engine.sampler.num_steps) as progress:
            for number, prompt in own:
                latents = self._sample(engine, number, prompt, progress)
                if not writes:
                    continue
                if bool(latents.isfinite().all()):
                    made.append((folder / _file_name(number, prompt), latents))
                else:
                    progress.say(f"validation video {number} is left out: it is not finite")
            # The autoencoder may have to be loaded for it: once, when the sampling is over.
            written = self._write(engine, made) if made else []
            for path in written:
                progress.say(str(path))
        return written

    def _sample(
        self, engine: SATVideoDiffusionEngine, number: int, prompt: str, progress: Progress
    ) -> Tensor:
        """Scaled latents (1, t, c, h, w) of one prompt."""
        cond = self.embed([prompt])
        return engine.sample(
            cond,
            engine.conditioner.unconditional(cond),
            (1, *self.shape),
            generator=sample_generator(self.seed, number, 0),
            callback=lambda *state: progress.step(f"validation video {number}"),
        )

    def _write(
        self, engine: SATVideoDiffusionEngine, videos: Sequence[tuple[Path, Tensor]]
    ) -> list[Path]:
        """Files of videos, each a path without suffix and latents (1, t, c, h, w)."""
        written, left = [], list(videos)
        if not self.only_latents:
            try:
                with engine.loaded_first_stage():
                    while left:
                        written += self._decode(engine, *left[0])
                        del left[0]
            except torch.cuda.OutOfMemoryError:
                logger.warning(
                    "too little memory to decode validation videos, so their latents are kept "
                    "instead; with only_log_video_latents: true none is decoded"
                )
        for stem, latents in left:
            path = stem.with_name(f"{stem.name}.safetensors")
            with replacing(path) as partial:
                save_file({"latents": latents.cpu()}, partial, _latents_metadata(engine))
            written.append(path)
        return written

    def _decode(self, engine: SATVideoDiffusionEngine, stem: Path, latents: Tensor) -> list[Path]:
        """The mp4 and the contact sheet of one video."""
        mp4, sheet = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".png"))
        base = self.folder / f"{0:06d}" / sheet.name
        chunks = (chunk[0] for chunk in engine.decode_first_stage(latents))
        write_video(chunks, mp4, sheet, fps=self.fps, above=base if base != sheet else None)
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
