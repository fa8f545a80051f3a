"""Text to video in one place: encode the prompt, sample latents, decode them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from sgm.checkpoint.find import find_lora
from sgm.config import Config, SamplingArgs, check_given, load_config
from sgm.distributed import Rank
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.loading import choose_device, compile_network, load_engine, warn_of_settings
from sgm.modules.diffusionmodules.sampling import Sampler
from sgm.modules.transformer.step_cache import cached_steps
from sgm.parallel.processes import LostProcess, group_of_all, in_step, share_sampling
from sgm.preflight import RunWeights, check_sampling, latent_shape, num_latent_frames
from sgm.seeds import sample_generator
from sgm.util import allow_targets
from sgm.video import collect_frames, mp4_path, to_uint8, write_mp4

Conditioning = dict[str, Tensor]

_BUSY = "this pipeline is at work; wait for its end, or leave the loop over its steps"


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video.

    Attributes:
        frames: (t, h, w, 3) uint8. Where several processes made it together, only the first of them
            has frames.
        fps: frames per second.
        sampling_seconds, decoding_seconds: time that it took; decoding includes writing the mp4.
    """

    frames: np.ndarray
    fps: float
    sampling_seconds: float
    decoding_seconds: float

    def save(self, path: str | Path) -> None:
        """Write an mp4 (H.264).

        Raises:
            UserError: the file cannot be written.
        """
        write_mp4([self.frames], mp4_path(path), fps=self.fps)


@dataclass(frozen=True, eq=False)
class Step:
    """A step of sampling that is done.

    Attributes:
        step_index: 0..num_steps-1.
        num_steps: steps of the run.
        latents: (1, t, c, h, w) float32, scaled, on the model's device; after the last step the
            result. They must not be changed in place.
    """

    step_index: int
    num_steps: int
    latents: Tensor
    _preview: Callable[[], np.ndarray] = field(repr=False)

    def preview(self) -> np.ndarray:
        """This step's estimate of the video, one pixel for each latent: (t, h, w, 3) uint8.

        Nothing is decoded: a linear map, fitted to the autoencoder at the first call, gives the
        colours. Waits for the device.
        """
        return self._preview()


@dataclass(frozen=True)
class CallDefaults:
    """Settings of a pipeline: those that a call may replace, and those of every call.

    Attributes:
        shape: (t, c, h, w) of the latents.
        fps: frames per second of the videos.
        seed, negative_prompt: as in `CogVideoX.stream`.
        step_cache: see `sgm.modules.transformer.step_cache.cached_steps`.
        compile: whether to compile the transformer's blocks; None: see `CogVideoX.compile`.
    """

    shape: tuple[int, int, int, int]
    fps: float
    seed: int
    negative_prompt: str = ""
    step_cache: float = 0.0
    compile: bool | None = False

    @classmethod
    def of(cls, args: SamplingArgs, model: Mapping[str, Any]) -> CallDefaults:
        """The defaults that `args` and the section `model` of a configuration give.

        Raises:
            UserError: the model does not make videos of that size.
        """
        return cls(
            shape=latent_shape(args, model),
            fps=args.sampling_fps,
            seed=args.seed,
            negative_prompt=args.negative_prompt,
            step_cache=args.step_cache,
            compile=args.compile,
        )


@dataclass(frozen=True)
class _Request:
    """One video to make, with all values checked."""

    prompt: str
    negative_prompt: str
    seed: int
    line: int
    sample: int
    shape: tuple[int, int, int, int]  # (t, c, h, w) of the latents
    sampler: Sampler


class CogVideoX:
    """A loaded model that makes videos from prompts, one at a time.

    Use `from_config` to load one. As a context manager it is closed at the end.

    Args:
        engine: in evaluation mode, with a sampler.
        model: the section `model` of its configuration.
        defaults: values of a call that does not give them.
        embed: conditioning of texts; None: by the engine's text encoder.
    """

    def __init__(
        self,
        engine: SATVideoDiffusionEngine,
        model: Mapping[str, Any],
        defaults: CallDefaults,
        *,
        embed: Callable[[Sequence[str]], Conditioning] | None = None,
    ) -> None:
        self.engine = engine
        self.defaults = defaults
        self._model = model
        self._embed = embed or engine.conditioner.encode
        self._embedded: dict[str, tuple[str, Conditioning]] = {}  # the last text of each kind
        self._rgb: Tensor | None = None
        self._busy = threading.Lock()
        self.group: distributed.ProcessGroup | None = None  # processes that make videos together
        self._is_lost = False  # whether this process has left a video that others make with it
        self._running: weakref.ref[Iterator[Step | Video]] | None = None
        self._is_compiled = False

    @classmethod
    def from_config(
        cls, *files: str | Path, allow_target: Sequence[str] = (), **args: Any
    ) -> CogVideoX:
        """Load the model that YAML files describe.

        Args:
            files: merged in this order, as by ``--base`` of sample_video.py.
            allow_target: further dotted prefixes under which the files may name classes; for files
                that you trust.
            args: keys of the section `args`; they win over the files. Relative paths, those in the
                files too, start at the current folder.

        Raises:
            UserError: a value, a file or the weights cannot be used.
        """
        given = check_given(SamplingArgs, args, where="from_config")
        names = [str(file) for file in files]
        config = load_config(SamplingArgs, names, given, allow_target=allow_target)
        pipe = cls.load(config, check_sampling(config))
        warn_of_settings(pipe.engine, config.args)
        return pipe

    @classmethod
    def load(cls, config: Config, weights: RunWeights) -> CogVideoX:
        """Load the model of a configuration, with weights that `check_sampling` found.

        With ``parallel: video`` the processes that torchrun started make each video together.

        Raises:
            UserError: the configuration or the weights cannot be used.
        """
        rank = Rank.from_environment()
        allow_targets(config.allow_target)
        device = choose_device(config.args, rank)
        engine = load_engine(config, device, weights=weights)
        pipe = cls(engine, config.model, CallDefaults.of(config.args, config.model))
        if config.args.parallel == "video" and rank.world_size > 1:
            share_sampling(engine.model.diffusion_model, engine.sampler)
            pipe.group = group_of_all()
            engine.share_decoding(pipe.group)
        return pipe

    def __enter__(self) -> CogVideoX:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        with suppress(UserError) if failure else nullcontext():
            self.close()

    def close(self) -> None:
        """Drop the weights, so that their memory is free for others; no video can be made then.

        A stream that waits for its next step ends.

        Raises:
            UserError: a call is running in another thread.
        """
        running = self._running and self._running()
        if running is not None:
            with suppress(ValueError):  # it is computing, in another thread
                running.close()
        with self._alone():
            engine, self.engine = self.engine, None
            self._embedded.clear()
            self._embed = self._rgb = None
            if engine is None:
                return
            for weight in chain(engine.parameters(), engine.buffers()):
                weight.data = weight.data.new_empty(0)  # also for others that hold the module
            del engine, weight
            gc.collect()  # modules whose weights are streamed refer to themselves
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def __call__(self, prompt: str, **options: Any) -> Video:
        """Make a video; options and errors are those of `stream`."""
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
        """Make a video and report each step. Leaving the loop early stops the run.

        Arguments that are None have the configuration's values.

        Args:
            prompt: what to show.
            negative_prompt: what not to show; empty: the trained unconditional embedding.
            seed: any integer. A video depends on the seed, its prompts and `index`.
            num_steps: steps of sampling, 2..1000; also the guider's own number.
            guidance_scale: the guider's `scale`. For DynamicCFG that is the height of its curve, so
                that 0 means no guidance.
            num_frames: frames of the video, for example 49.
            index: a line of a prompt file, from 0, or a pair of a line and the number of a sample.
            path: an mp4, written while decoding goes on; its folder is made where it is missing.
            decode: False: only sample; the last step's latents are the result, and `path` is not
                used.

        Yields:
            A `Step` for each step, and the `Video` last.

        Raises:
            UserError: a value cannot be used, another call is running, the pipeline is closed, the
                result is not finite, or the file cannot be written.
            LostProcess: this process failed in work that others need.
        """
        request = self._request(
            prompt,
            {"negative_prompt": negative_prompt, "seed": seed},
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            num_frames=num_frames,
            index=index,
        )
        if self._busy.locked():
            raise UserError(_BUSY)
        if path is not None and self.group is None:
            path = mp4_path(path)
        # Together only the first process finds out at the end: all must do the same until then.
        target = None if path is None else Path(path).absolute()
        run = self._run(request, target) if decode else self._sample_alone(request)
        self._running = weakref.ref(run)
        return run

    def set_loras(self, loras: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]) -> None:
        """Merge LoRAs into the weights in the place of those that were merged before.

        The weights are restored from their files first, so that the result has the bytes of a fresh
        start with these LoRAs.

        Args:
            loras: a path, ``PATH:0.8`` with a strength, ``{"path": …, "scale": …}``, or a list of
                these; an empty list restores the base model.

        Raises:
            UserError: a file is not a LoRA of this model (nothing is changed then), a call is
                running, or the pipeline is closed.
        """
        choices = check_given(SamplingArgs, {"lora": loras or []}, where="set_loras")["lora"]
        with self._alone():
            self._require_open()
            found = [replace(choice, path=find_lora(choice.path)) for choice in choices]
            self.engine.replace_loras(found)

    def compile(self, *, num_steps: int) -> None:
        """Compile the transformer's blocks, if the option `compile` says so or is not given.

        Compiled blocks round differently, so this is for before the first video. A pipeline on
        which it is not called compiles with ``compile=True`` only.

        Args:
            num_steps: steps that are to come; without the option, a GPU compiles from 100 on.
        """
        self._require_open()
        self._is_compiled = self._is_compiled or compile_network(
            self.engine, self.defaults.compile, num_steps=num_steps
        )

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Scaled latents (1, t, c, h, w) → chunks (t, h, w, 3) of the video, uint8, in order.

        Raises:
            UserError: another call is running, or the pipeline is closed.
        """
        with self._alone():
            self._require_open()
            yield from self._decode(latents)

    def _decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        with closing(self.engine.decode_first_stage(latents)) as chunks:
            for chunk in chunks:
                yield to_uint8(chunk[0])

    def _request(
        self,
        prompt: str,
        texts_and_seed: Mapping[str, Any],
        *,
        num_steps: int | None,
        guidance_scale: float | None,
        num_frames: int | None,
        index: int | tuple[int, int],
    ) -> _Request:
        """Check the arguments of `stream` and complete them.

        Raises:
            UserError: a value cannot be used, or the pipeline is closed.
        """
        self._require_open()
        if not isinstance(prompt, str):
            raise UserError(f"prompt: {prompt!r} must be a text")
        given = check_given(SamplingArgs, texts_and_seed, where="CogVideoX")
        place = index if isinstance(index, tuple) else (index, 0)
        if len(place) != 2 or not all(type(number) is int and number >= 0 for number in place):
            raise UserError(
                f"index: {index!r} must be a whole number from 0, or a pair of these: the line of "
                "a prompt file and the number of the sample"
            )
        shape, sampler = self.defaults.shape, self.engine.sampler
        if num_frames is not None:
            shape = (num_latent_frames(num_frames, self._model), *shape[1:])
        if num_steps is not None or guidance_scale is not None:
            sampler = sampler.adjusted(num_steps=num_steps, guidance_scale=guidance_scale)
        return _Request(
            prompt,
            given.get("negative_prompt", self.defaults.negative_prompt),
            given.get("seed", self.defaults.seed),
            *place,
            shape=shape,
            sampler=sampler,
        )

    def _require_open(self) -> None:
        """Raise UserError where the pipeline is closed, LostProcess where others left it behind."""
        if self.engine is None:
            raise UserError("this pipeline is closed; load it again with CogVideoX.from_config")
        if self._is_lost:
            raise LostProcess(
                "this process left a video that other processes make with it, so that no more can "
                "be made; start all of them again"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raise UserError where another call is running, and keep others out meanwhile."""
        if not self._busy.acquire(blocking=False):
            raise UserError(_BUSY)
        try:
            yield
        finally:
            self._busy.release()

    def _run(self, request: _Request, path: Path | None) -> Iterator[Step | Video]:
        """One video, from the prompt to its frames."""
        fps = self.defaults.fps
        with self._alone():
            latents, started = yield from self._sample(request)
            is_together = self.group is not None
            writes = not is_together or self.group.rank() == 0
            with in_step(together=is_together):
                is_finite = bool(latents.isfinite().all())  # waits for the device
                sampled = time.perf_counter()
                chunks = self._decode(latents)
                # Together all of it now, so that no process waits for the first one's writing.
                frames = list(chunks) if is_together else chunks
            if writes and not is_finite:
                raise UserError(
                    "the result is not finite; the weights may be damaged, or try --bf16 or full "
                    "precision"
                )
            with closing(chunks):  # the decoder's weights may be on the GPU until then
                made = collect_frames(frames, path if writes else None, fps=fps)
            yield Video(made, fps, sampled - started, time.perf_counter() - sampled)

    def _sample_alone(self, request: _Request) -> Iterator[Step]:
        with self._alone():
            yield from self._sample(request)

    def _sample(self, request: _Request) -> Generator[Step, None, tuple[Tensor, float]]:
        """The steps of a video; returns its latents, and when sampling began."""
        self._require_open()  # it may be closed since the call
        if self.defaults.compile and not self._is_compiled:
            self.compile(num_steps=request.sampler.num_steps)
        with in_step(together=self.group is not None), self._to_the_end():
            cond = self._encode("prompt", request.prompt)
            if request.negative_prompt:
                uncond = self._encode("negative", request.negative_prompt)
            else:
                uncond = self.engine.conditioner.unconditional(cond)
            started = time.perf_counter()
            network = self.engine.model.diffusion_model
            steps = self.engine.sample_steps(
                cond,
                uncond,
                (1, *request.shape),
                generator=sample_generator(request.seed, request.line, request.sample),
                sampler=request.sampler,
            )
            with cached_steps(network, self.defaults.step_cache), closing(steps):
                for step in steps:
                    denoised = step.denoised
                    yield Step(
                        step.step_index,
                        request.sampler.num_steps,
                        step.x,
                        lambda denoised=denoised: self._picture(denoised),
                    )
        return step.x, started

    @contextmanager
    def _to_the_end(self) -> Iterator[None]:
        """Note where this process leaves work that others do with it."""
        try:
            yield
        except GeneratorExit:
            self._is_lost = self.group is not None
            raise

    def _encode(self, kind: str, text: str) -> Conditioning:
        """Conditioning of a text; that of the last one of its kind is kept."""
        kept = self._embedded.get(kind)
        if kept is None or kept[0] != text:
            kept = self._embedded[kind] = text, self._embed([text])
        return kept[1]

    def _picture(self, latents: Tensor) -> np.ndarray:
        """Latents (1, t, c, h, w) → (t, h, w, 3) uint8; see `Step.preview`."""
        self._require_open()
        if self._rgb is None:
            self._rgb = self.engine.fit_rgb()
        unscaled = (latents[0] / self.engine.scale_factor).float().cpu()
        colours = unscaled.movedim(1, -1) @ self._rgb[:-1] + self._rgb[-1]  # (t, h, w, 3)
        return to_uint8(colours.movedim(-1, 1))
