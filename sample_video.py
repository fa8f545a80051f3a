"""Generate videos from prompts: ``python sample_video.py --base config.yaml [--flags]``."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import parse_config
from sgm.cli import no_garbage_collection, run_and_exit, set_up_logging
from sgm.config import Config, SamplingArgs
from sgm.distributed import Rank, Ranks
from sgm.errors import UserError
from sgm.files import expanded, installed_versions, make_output_folder
from sgm.preflight import check_sampling
from sgm.prompts import Prompt, read_prompt_file, read_typed_prompts

if TYPE_CHECKING:
    from sgm.pipeline import CogVideoX, Video
    from sgm.progress import Progress

# Heavy modules (PyTorch, SAT) are imported at first use. Mistakes in the command line or in a
# configuration are reported before these imports.

logger = logging.getLogger(__name__)

# Packages whose versions can change the pixels of a video.
PACKAGES = "torch SwissArmyTransformer transformers imageio-ffmpeg triton flash-attn-4".split()


def get_prompts(args: SamplingArgs, rank: Rank) -> Iterable[Prompt]:
    """Return the prompts of this rank.

    Raises:
        UserError: the prompt file is invalid, or prompts are typed and there are several processes.
    """
    if args.input_type == "txt":
        prompts = read_prompt_file(args.input_file)
        return prompts if args.parallel == "video" else prompts[rank.index :: rank.world_size]
    if rank.world_size > 1:
        raise UserError("input_type: cli works in one process only; use input_type: txt")
    return read_typed_prompts()


def make_videos(pipe: CogVideoX, config: Config, prompt: Prompt, *, progress: Progress) -> None:
    """Generate all samples of a prompt; write them and their records into the output folder.

    Args:
        pipe: the model.
        config: the configuration of the run.
        prompt: the prompt.
        progress: counts the steps.

    Raises:
        UserError: a file cannot be written, or the result is not finite.
        LostProcessError: this process failed while other processes need its result.
    """
    from sgm.pipeline import Step
    from sgm.video import write_contact_sheet

    for sample in range(config.args.batch_size):
        folder = expanded(config.args.output_dir) / prompt.folder_name / str(sample)
        path = folder / "000000.mp4"
        # Samples are not batched, because a sample must not depend on the number of samples.
        index = (prompt.line, sample)
        for event in pipe.stream(prompt.text, index=index, path=path.absolute()):
            if isinstance(event, Step):
                progress.step(f"prompt {prompt.line}, sample {sample}")
        if len(event.frames):  # with parallel: video, only the first process has frames
            write_contact_sheet(event.frames, folder / "contact_sheet.png")
            write_record(config, prompt, sample, event, folder / "run.json")
            seconds = event.sampling_seconds + event.decoding_seconds
            progress.say(f"{path} ({seconds:.1f} s)")


def write_record(config: Config, prompt: Prompt, sample: int, video: Video, path: Path) -> None:
    """Write a JSON file with the settings that reproduce a video, and its timings.

    Raises:
        UserError: the file cannot be written.
    """
    from sgm.video import write_json

    record = {
        "prompt": prompt.text,
        "line": prompt.line,
        "sample": sample,
        "seed": config.args.seed,
        "config_files": config.files,
        "args": config.args.model_dump(),
        "model": config.model,
        "versions": {"python": platform.python_version()} | installed_versions(PACKAGES),
        "timings": {
            "sampling_seconds": video.sampling_seconds,
            "decoding_seconds": video.decoding_seconds,
            **peak_memory(),
        },
    }
    write_json(record, path)


def peak_memory() -> dict[str, float]:
    """Return this process's peak memory in GiB: host memory, and GPU memory if it uses a GPU."""
    import resource

    import torch

    peak = {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_initialized():
        peak["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def sample_all(pipe: CogVideoX, config: Config, prompts: Iterable[Prompt], *, rank: Rank) -> int:
    """Generate the videos of all prompts; report a prompt that fails and continue with the next.

    Returns:
        The number of prompts that failed.

    Raises:
        LostProcessError: this process failed, and several processes generate each video together.
    """
    from sgm.parallel.processes import LostProcessError
    from sgm.progress import Progress

    # Every process logs the files that it writes. Only the first process logs its steps.
    logging.getLogger("sgm.progress").setLevel(logging.INFO)
    steps = None
    if isinstance(prompts, list):  # the number of typed prompts is unknown
        steps = len(prompts) * config.args.batch_size * pipe.engine.sampler.num_steps
    pipe.compile(num_steps=steps or 0)
    failed = 0
    with Progress(steps, lines=rank.index == 0) as progress:
        for prompt in prompts:
            try:
                make_videos(pipe, config, prompt, progress=progress)
            except LostProcessError:
                raise
            except Exception as error:  # a failed prompt must not stop the run
                failed += 1
                logger.debug("prompt %d", prompt.line, exc_info=True)
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                message = f"error: prompt {prompt.line} failed: {reason}"
                progress.say(message, level=logging.ERROR)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, load and sample; return the exit code, which is 1 if any prompt failed."""
    started = time.perf_counter()
    config = parse_config(SamplingArgs, "Make videos from prompts.", argv)
    args = config.args
    set_up_logging()
    rank = Rank.from_environment()
    prompts = get_prompts(args, rank)
    with no_garbage_collection():
        weights = check_sampling(config)

        from sgm.pipeline import CogVideoX
        from sgm.sat_runtime import leave_process_groups_at_exit

        make_output_folder(expanded(args.output_dir))
        pipe = CogVideoX.load(config, weights)
    logger.info("model ready on %s after %.1f s", pipe.engine.device, time.perf_counter() - started)
    with Ranks() as ranks:
        failed = sum(ranks.gather(sample_all(pipe, config, prompts, rank=rank)))
    leave_process_groups_at_exit()
    return 1 if failed else 0


if __name__ == "__main__":
    run_and_exit(main)
