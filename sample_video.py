"""Text to video: ``python sample_video.py --base config.yaml [--flags]``."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import parse_config
from sgm.cli import no_garbage_collection, run_and_exit, set_up_logging
from sgm.config import Config, SamplingArgs
from sgm.distributed import Rank, any_rank
from sgm.errors import UserError
from sgm.files import installed_versions, make_output_folder
from sgm.preflight import find_weights, latent_shape
from sgm.prompts import Prompt, read_prompt_file, read_typed_prompts

if TYPE_CHECKING:
    import torch

    from sgm.engine import SATVideoDiffusionEngine
    from sgm.progress import Progress

logger = logging.getLogger(__name__)

# What the numbers of a video depend on.
PACKAGES = (
    "torch",
    "SwissArmyTransformer",
    "transformers",
    "imageio-ffmpeg",
    "triton",
    "flash-attn-4",
)


def shares_videos(args: SamplingArgs, rank: Rank) -> bool:
    """Whether this process and others make each video together."""
    return args.parallel == "video" and rank.world_size > 1


def get_prompts(args: SamplingArgs, rank: Rank) -> Iterable[Prompt]:
    """The prompts that this rank works on.

    Raises:
        UserError: the prompt file is wrong, or several processes would share one keyboard.
    """
    if args.input_type == "txt":
        prompts = read_prompt_file(args.input_file)
        return prompts if shares_videos(args, rank) else prompts[rank.index :: rank.world_size]
    if rank.world_size > 1:
        raise UserError("input_type: cli works in one process only; use input_type: txt")
    return read_typed_prompts()


class PromptRunner:
    """Makes the videos of prompts one by one and writes them to the output folder."""

    def __init__(
        self,
        engine: SATVideoDiffusionEngine,
        config: Config,
        *,
        rank: Rank,
        shape: Sequence[int],
        output_dir: Path,
        progress: Progress,
    ) -> None:
        self.engine = engine
        self.config = config
        self.args = config.args
        self.together = shares_videos(config.args, rank)
        self.writes = not self.together or rank.index == 0
        self.shape = shape
        self.output_dir = output_dir
        self.progress = progress
        self.uncond = None

    def run(self, prompt: Prompt) -> None:
        """All samples of a prompt.

        Raises:
            UserError: a file cannot be written.
            LostProcess: this process failed where the others need it.
        """
        from sgm.parallel.processes import in_step

        with in_step(together=self.together):
            cond = self.engine.conditioner.encode([prompt.text])
            if self.uncond is None:
                conditioner, negative = self.engine.conditioner, self.args.negative_prompt
                zeros = conditioner.unconditional
                self.uncond = conditioner.encode([negative]) if negative else zeros(cond)
        for sample in range(self.args.batch_size):
            self._sample(prompt, sample, cond)

    def _sample(self, prompt: Prompt, sample: int, cond: dict[str, torch.Tensor]) -> None:
        """One video."""
        from sgm.parallel.processes import in_step

        started = time.perf_counter()
        with in_step(together=self.together):
            latents = self._latents(prompt, sample, cond)
            is_finite = bool(latents.isfinite().all())  # waits for the device
            sampled = time.perf_counter()
            chunks = self.engine.decode_first_stage(latents)
            # Together all of it now, so that nobody waits for the first one's writing.
            frames = list(chunks) if self.together else chunks
        if not self.writes:
            return
        if not is_finite:
            raise UserError(
                f"prompt {prompt.line}: the result is not finite; the weights may be damaged, or "
                "try --bf16 or full precision"
            )
        folder = self.output_dir / prompt.folder_name / str(sample)
        with closing(chunks):  # the decoder's weights may be on the GPU until then
            self._write(frames, folder)
        written = time.perf_counter()
        timings = {"sampling_seconds": sampled - started, "decoding_seconds": written - sampled}
        self._write_record(prompt, sample, timings, folder)
        self.progress.say(f"{folder / '000000.mp4'} ({written - started:.1f} s)")

    def _latents(self, prompt: Prompt, sample: int, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of one video. Samples are drawn singly, so that none depends on how many there are."""
        from sgm.modules.transformer.step_cache import cached_steps
        from sgm.seeds import sample_generator

        with cached_steps(self.engine.model.diffusion_model, self.args.step_cache):
            return self.engine.sample(
                cond,
                self.uncond,
                (1, *self.shape),
                generator=sample_generator(self.args.seed, prompt.line, sample),
                callback=lambda *_: self.progress.step(f"prompt {prompt.line}, sample {sample}"),
            )

    def _write(self, chunks: Iterable[torch.Tensor], folder: Path) -> None:
        """The mp4, frame by frame while decoding goes on, and its contact sheet."""
        from sgm.video import write_video

        make_output_folder(folder)
        paths = folder / "000000.mp4", folder / "contact_sheet.png"
        write_video((chunk[0] for chunk in chunks), *paths, fps=self.args.sampling_fps)

    def _write_record(
        self, prompt: Prompt, sample: int, timings: dict[str, float], folder: Path
    ) -> None:
        """run.json: all that is needed to make the video again, and how long it took."""
        from sgm.video import write_json

        record = {
            "prompt": prompt.text,
            "line": prompt.line,
            "sample": sample,
            "seed": self.args.seed,
            "config_files": self.config.files,
            "args": asdict(self.args),
            "model": self.config.model,
            "versions": {"python": platform.python_version()} | installed_versions(PACKAGES),
            "timings": timings | peak_memory(),
        }
        write_json(record, folder / "run.json")


def peak_memory() -> dict[str, float]:
    """Peak memory of this process so far: of the host, and of the GPU where one is used."""
    import resource

    import torch

    peak = {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_initialized():
        peak["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def sample_all(
    engine: SATVideoDiffusionEngine,
    config: Config,
    prompts: Iterable[Prompt],
    *,
    rank: Rank,
    steps: int | None,
    **places: Any,
) -> int:
    """Every prompt's videos; a prompt that fails is reported and does not stop the others.

    Args:
        engine, config, prompts: what makes which videos.
        rank: this process.
        steps: of all videos, where that is known.
        places: further arguments of `PromptRunner`.

    Returns:
        Number of prompts that failed.

    Raises:
        LostProcess: several processes work on each video, and this one failed in that.
    """
    from sgm import progress as progress_module
    from sgm.parallel.processes import LostProcess

    # Every process tells what it has written, but the first one's steps stand for all.
    progress_module.logger.setLevel(logging.INFO)
    failed = 0
    with progress_module.Progress(steps, lines=rank.index == 0) as progress:
        runner = PromptRunner(engine, config, progress=progress, rank=rank, **places)
        for prompt in prompts:
            try:
                runner.run(prompt)
            except LostProcess:
                raise
            except Exception as error:  # whatever it is, the other prompts have a right to be made
                failed += 1
                logger.debug("prompt %d", prompt.line, exc_info=True)
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                progress.complain(f"error: prompt {prompt.line} failed: {reason}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, load, sample; returns the exit code: 1 if any prompt failed."""
    started = time.perf_counter()
    config = parse_config(SamplingArgs, "Make videos from prompts.", argv)
    args = config.args
    set_up_logging()
    rank = Rank.from_environment()
    shape = latent_shape(args, config.model)
    prompts = get_prompts(args, rank)
    with no_garbage_collection():
        model = config.model | {"latent_input": False}  # sampling decodes in any case
        weights = find_weights(model, args.load, lora=args.lora)

        from sgm.pipeline import (
            advise,
            choose_device,
            compile_network,
            count_steps,
            load_engine,
        )
        from sgm.util import allow_targets

        output_dir = make_output_folder(args.output_dir)
        allow_targets(config.allow_target)
        device = choose_device(args, rank)
        engine = load_engine(config, device, weights=weights)
    logger.info("model ready on %s after %.1f s", device, time.perf_counter() - started)
    advise(engine, args, device=device, world_size=rank.world_size)
    everyone = None
    if rank.world_size > 1:
        from sgm.parallel.processes import group_of_all, share_sampling

        everyone = group_of_all()
        if shares_videos(args, rank):
            share_sampling(engine.model.diffusion_model, engine.sampler)
            engine.share_decoding(everyone)
    steps = count_steps(engine, args, prompts)
    compile_network(engine, args, device=device, steps=steps)
    places = {"shape": shape, "output_dir": output_dir}
    failed = sample_all(engine, config, prompts, rank=rank, steps=steps, **places)
    any_failed = any_rank(failed > 0, everyone)

    from sgm.sat_runtime import leave_process_groups_at_exit

    leave_process_groups_at_exit()
    return 1 if any_failed else 0


if __name__ == "__main__":
    run_and_exit(main)
