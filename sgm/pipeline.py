"""The text-to-video pipeline: encode the prompt, sample latents, decode them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from sgm.config import Config, SamplingArgs, as_in_yaml, check_given, load_config
from sgm.distributed import Rank
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.files import expanded
from sgm.loading import choose_device, compile_network, load_engine, warn_of_settings
from sgm.modules.diffusionmodules.sampling import SampledStep, Sampler
from sgm.modules.transformer.step_cache import cached_steps
from sgm.parallel.processes import PATIENCE, LostProcessError, in_step, share_sampling
from sgm.preflight import RunWeights, check_model_section, check_sampling, num_latent_frames
from sgm.seeds import sample_generator
from sgm.util import allow_targets
from sgm.video import collect_frames, mp4_path, to_uint8, write_mp4

Conditioning = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video.

    Attributes:
        frames: (t, h, w, 3) uint8. If several processes made the video together, only the first
            process has frames.
        fps: frames per second.
        sampling_seconds, decoding_seconds: durations; decoding includes writing the mp4.
    """

    frames: np.ndarray
    fps: float
    sampling_seconds: float
    decoding_seconds: float

    def save(self, path: str | Path) -> None:
        """Write the video to `path`, an mp4 file (H.264), whose folder is created if missing.

        Raises:
            UserError: the file cannot be written.
        """
        write_mp4([self.frames], mp4_path(path), fps=self.fps)


@dataclass(frozen=True, eq=False)
class Step:
    """A finished sampling step.

    Attributes:
        step_index: 0..num_steps-1.
        num_steps: steps of the run.
        latents: (1, t, c, h, w) float32, scaled, on the model's device. The latents of the last
            step are the result. Do not change them in place.
    """

    step_index: int
    num_steps: int
    latents: Tensor
    _preview: Callable[[], np.ndarray] = field(repr=False)

    def preview(self) -> np.ndarray:
        """Return a preview of the video at this step, one pixel per latent: (t, h, w, 3) uint8.

        Nothing is decoded. A linear map, which is fitted to the autoencoder at the first call,
        turns the latents into colours. The call waits for the device.

        Raises:
            UserError: the pipeline is closed.
        """
        return self._preview()


class CogVideoX:
    """A loaded model that makes videos from prompts, one at a time.

    Use `from_config` to load a model. An object of this class is also a context manager, which
    closes it at the end.

    Args:
        engine: the engine, in evaluation mode, with a sampler.
        model: the section `model` of the engine's configuration.
        args: the options; the arguments of a call override some of them.
        embed: function that returns the conditioning of texts; None uses the engine's text encoder.

    Attributes:
        group: the processes that make each video together; None if this process works alone.
    """

    def __init__(
        self,
        engine: SATVideoDiffusionEngine,
        model: Mapping[str, Any],
        args: SamplingArgs,
        *,
        embed: Callable[[Sequence[str]], Conditioning] | None = None,
    ) -> None:
        self.engine: SATVideoDiffusionEngine | None = engine  # None after `close`
        self.args = args
        self._model = model
        embed = embed or engine.conditioner.encode
        # Caches two texts: the last prompt and the last negative prompt.
        self._encode = lru_cache(maxsize=2)(lambda text: embed([text]))
        self._rgb: Tensor | None = None
        self._busy = threading.Lock()
        self.group: distributed.ProcessGroup | None = None
        self._is_lost = False  # whether this process abandoned a video of its group
        self._running: weakref.ref[Iterator[Step | Video]] | None = None
        self._is_compiled = False

    @classmethod
    def from_config(
        cls, *files: str | Path, allow_target: Sequence[str] = (), **args: object
    ) -> CogVideoX:
        """Load the model that YAML files describe.

        Args:
            files: YAML files, merged in this order, like ``--base`` of sample_video.py.
            allow_target: further dotted prefixes under which the files may name classes. Add
                prefixes only for files that you trust.
            args: keys of the section `args`; they override the files. Relative paths, here and in
                the files, are relative to the current folder.

        Raises:
            UserError: a value, a file or the weights cannot be used.
        """
        given = check_given(SamplingArgs, args, where="from_config")
        names = [str(file) for file in files]
        config = load_config(SamplingArgs, names, given, allow_target=allow_target)
        return cls.load(config, check_sampling(config))

    @classmethod
    def load(cls, config: Config, weights: RunWeights) -> CogVideoX:
        """Load the model of a configuration with the weights that `check_sampling` found.

        With ``parallel: video``, the processes that torchrun started make each video together.

        Raises:
            UserError: the configuration or the weights cannot be used.
        """
        rank = Rank.from_environment()
        allow_targets(config.allow_target)
        engine = load_engine(config, choose_device(config.args, rank), weights=weights)
        warn_of_settings(engine)
        pipe = cls(engine, config.model, config.args)
        if config.args.parallel == "video" and rank.world_size > 1:
            assert engine.sampler is not None  # `load_engine` checks it
            share_sampling(engine.model.diffusion_model, engine.sampler)
            pipe.group = engine.decoding_group = distributed.new_group(timeout=PATIENCE)
        return pipe

    def __enter__(self) -> CogVideoX:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        with suppress(UserError) if failure else nullcontext():
            self.close()

    def close(self) -> None:
        """Free the memory of the weights; the pipeline cannot make videos afterwards.

        A stream that is waiting between two steps ends.

        Raises:
            UserError: a call is running in another thread.
        """
        running = self._running and self._running()
        if running is not None:
            with suppress(ValueError):  # the stream is computing, in another thread
                running.close()
        with self._alone(needs_open=False):
            if self.engine is None:
                return
            for weight in chain(self.engine.parameters(), self.engine.buffers()):
                weight.data = weight.data.new_empty(0)  # other code may refer to the module
            self.engine = self._rgb = None
            del self._encode, weight
            gc.collect()  # modules with streamed weights are in reference cycles
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def __call__(self, prompt: str, **options: Any) -> Video:
        """Make a video and return it; options and errors are the same as for `stream`."""
        last: Any = None
        for event in self.stream(prompt, **options):
            last = event
        return last

    def stream(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        num_frames: int | None = None,
        index: int | tuple[int, int] = 0,
        path: str | Path | None = None,
        decode: bool = True,
    ) -> Iterator[Step | Video]:
        """Make a video and yield each step. The run stops if the caller leaves the loop early.

        An argument that is None takes its value from the configuration.

        Args:
            prompt: what the video shows.
            negative_prompt: what the video should not show; an empty text selects the
                unconditional embedding of the training.
            seed: any integer. A video depends on the seed, the prompts and `index`.
            num_steps: number of sampling steps, 2..1000; also sets the guider's `num_steps`.
            guidance_scale: the guider's `scale`. For DynamicCFG this is the height of its curve,
                and 0 means no guidance.
            num_frames: number of frames of the video, for example 49.
            index: line of the prompt in a prompt file, from 0, or a pair (line, sample).
            path: mp4 file to write during decoding. Its folder is created if missing.
            decode: False only samples: the latents of the last step are the result, and `path` is
                not used.

        Yields:
            A `Step` for each step, and finally the `Video` (unless `decode` is False).

        Raises:
            UserError: a value cannot be used, another call is running, the pipeline is closed, the
                result is not finite, or the file cannot be written.
            LostProcessError: this process failed in work that the other processes wait for.
        """
        with self._alone():  # so that this call itself fails if another call is running
            sampler: Any = self.engine.sampler
            if num_steps is not None or guidance_scale is not None:
                sampler = sampler.adjusted(num_steps=num_steps, guidance_scale=guidance_scale)
        if not isinstance(prompt, str):
            raise UserError(f"CogVideoX: prompt: {prompt!r} must be a string")
        given: dict[str, Any] = {"negative_prompt": negative_prompt, "seed": seed}
        if num_frames is not None:
            frames = num_latent_frames(as_in_yaml(num_frames), self._model)
            given["sampling_num_frames"] = frames
        given = check_given(SamplingArgs, given, where="CogVideoX")
        args = self.args.model_copy(update=given)
        pair = index if isinstance(index, tuple) else (index, 0)
        line_and_sample = tuple(map(as_in_yaml, pair))
        if len(pair) != 2 or not all(type(n) is int and n >= 0 for n in line_and_sample):
            raise UserError(
                f"index: {index!r} must be a whole number from 0, or a pair of whole numbers: the "
                "line in a prompt file and the number of the sample"
            )
        if path is not None:
            # In a group the path is checked later: only the first process would fail here, and
            # the other processes would wait for it.
            path = mp4_path(path) if self.group is None else expanded(path).absolute()
        generator = sample_generator(args.seed, *line_and_sample)
        run = self._run(prompt, args, generator, sampler=sampler, path=path, decode=decode)
        self._running = weakref.ref(run)
        return run

    def set_loras(self, loras: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]) -> None:
        """Merge LoRAs into the weights, and remove those that were merged before.

        The weights are restored from their files first, so the result is bit-identical to loading
        the base model with these LoRAs.

        Args:
            loras: a LoRA, or a list of LoRAs; an empty list restores the base model. A LoRA is a
                path, ``PATH:0.8`` with a strength, or ``{"path": …, "scale": …}``.

        Raises:
            UserError: a file is not a LoRA for this model (the weights stay unchanged), a call is
                running, or the pipeline is closed.
        """
        choices = check_given(SamplingArgs, {"lora": loras or []}, where="set_loras")["lora"]
        with self._alone():
            self.engine.replace_loras(choices)

    def compile(self, *, num_steps: int) -> None:
        """Compile the transformer's blocks, unless the option `compile` is false.

        Compiled blocks round differently, so call this before the first video. Without this call,
        the first video compiles the blocks if the option is true.

        Args:
            num_steps: total number of steps that will be sampled. If the option is not set, the
                blocks are compiled only on a GPU and for at least 100 steps.

        Raises:
            UserError: the pipeline is closed.
        """
        engine = self._require_open()
        self._is_compiled = self._is_compiled or compile_network(
            engine, self.args.compile, num_steps=num_steps
        )

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Decode scaled latents (1, t, c, h, w) and yield the video in chunks (t, h, w, 3), uint8.

        Raises:
            UserError: another call is running, or the pipeline is closed.
        """
        with self._alone():
            yield from self._decode(latents)

    def _require_open(self) -> SATVideoDiffusionEngine:
        """Return the engine.

        Raises:
            UserError: the pipeline is closed.
            LostProcessError: this process abandoned a video that a group was making.
        """
        if self.engine is None:
            raise UserError("this pipeline is closed; load it again with CogVideoX.from_config")
        if self._is_lost:
            raise LostProcessError(
                "this process abandoned a video that it was making together with other processes, "
                "so it can make no further videos; start all processes again"
            )
        return self.engine

    @contextmanager
    def _alone(self, *, needs_open: bool = True) -> Iterator[None]:
        """Prevent other calls within this context.

        Raises:
            UserError: another call is running, or the pipeline is closed (if `needs_open`).
        """
        if not self._busy.acquire(blocking=False):
            raise UserError(
                "this pipeline is making a video; wait until that video is finished, or break out "
                "of the loop over its steps"
            )
        try:
            if needs_open:
                self._require_open()
            yield
        finally:
            self._busy.release()

    def _run(
        self,
        prompt: str,
        args: SamplingArgs,
        generator: torch.Generator,
        *,
        sampler: Sampler,
        path: Path | None,
        decode: bool,
    ) -> Generator[Step | Video, None, None]:
        """Make one video; `stream` documents the yielded values and the errors."""
        with self._alone():  # the pipeline may have been closed since the call
            if args.compile and not self._is_compiled:
                self.compile(num_steps=sampler.num_steps)
            is_together = self.group is not None
            with in_step(together=is_together):
                cond, negative = self._encode(prompt), args.negative_prompt
                unconditional = self.engine.conditioner.unconditional
                uncond = self._encode(negative) if negative else unconditional(cond)
                started = time.perf_counter()
                shape = (1, args.sampling_num_frames, *check_model_section(self._model).frame_shape)
                steps = self.engine.sample_steps(
                    cond, uncond, shape, generator=generator, sampler=sampler
                )
                try:
                    latents = yield from self._report(steps, sampler.num_steps)
                except GeneratorExit:
                    self._is_lost = is_together
                    raise
            if not decode:
                return
            with in_step(together=is_together):
                is_finite = bool(latents.isfinite().all())  # waits for the device
                sampled = time.perf_counter()
                chunks = self._decode(latents)
                # In a group, decode everything first: if the first process wrote each chunk at
                # once, the other processes would wait for it.
                frames = list(chunks) if is_together else chunks
            writes = not is_together or self.group.rank() == 0
            if writes and not is_finite:
                raise UserError(
                    "the result is not finite; try --bf16 or full precision, or check whether the "
                    "weights are damaged"
                )
            fps = args.sampling_fps
            with closing(chunks):  # offloads the decoder's weights after a failure too
                array = collect_frames(frames, path if writes else None, fps=fps)
            yield Video(array, fps, sampled - started, time.perf_counter() - sampled)

    def _report(
        self, steps: Generator[SampledStep, None, None], num_steps: int
    ) -> Generator[Step, None, Tensor]:
        """Yield the steps of a video; return its latents."""
        network = self.engine.model.diffusion_model
        with cached_steps(network, self.args.step_cache), closing(steps):
            for step in steps:
                preview = partial(self._preview, step.denoised)
                yield Step(step.step_index, num_steps, step.x, preview)
        return step.x

    def _decode(self, latents: Tensor) -> Generator[np.ndarray, None, None]:
        with closing(self.engine.decode_first_stage(latents)) as chunks:
            for chunk in chunks:
                yield to_uint8(chunk[0])

    def _preview(self, latents: Tensor) -> np.ndarray:
        """Map latents (1, t, c, h, w) to colours (t, h, w, 3) uint8; see `Step.preview`."""
        self._require_open()
        if self._rgb is None:
            self._rgb = self.engine.fit_rgb()
        unscaled = (latents[0] / self.engine.scale_factor).float().cpu()
        colours = unscaled.movedim(1, -1) @ self._rgb[:-1] + self._rgb[-1]  # (t, h, w, 3)
        return to_uint8(colours.movedim(-1, 1))
