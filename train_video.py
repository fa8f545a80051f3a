"""Training of the transformer: ``python train_video.py --base config.yaml [--flags]``."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from subprocess import SubprocessError
from typing import TYPE_CHECKING, Any

from arguments import Config, TrainingArgs, parse_config
from sgm.cli import run_command, set_up_logging
from sgm.errors import UserError
from sgm.files import make_output_folder, replacing, save_torch
from sgm.inference.weights import check_weight_paths
from sgm.training.checks import SAT_OPTIMIZER, check_args, check_deepspeed, check_video_data

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader, Dataset

    from diffusion_video import SATVideoDiffusionEngine

# As in sample_video.py, heavy modules are imported once the configuration is known to be sound.

logger = logging.getLogger(__name__)


def load_engine(config: Config, device: torch.device) -> SATVideoDiffusionEngine:
    """The engine in training mode; weights from `load`, or random ones in mode pretrain.

    Raises:
        UserError: the configuration or a file of weights is wrong.
    """
    from diffusion_video import SATVideoDiffusionEngine
    from sgm.util import check_params

    load = None if config.args.mode == "pretrain" else config.args.load
    params = check_params(
        SATVideoDiffusionEngine, config.model | {"load": load, "device": device}, where="model"
    )
    if not params.get("loss_fn_config"):
        raise UserError("model.loss_fn_config is absent; training needs one")
    engine = SATVideoDiffusionEngine(**params).train()
    if not config.args.checkpoint_activations:  # it takes this one and transformer_args' to be on
        engine.model.diffusion_model.mixins["adaln_layer"].checkpoint_activations = False
    return engine


def build_dataset(config: Config, folders: Sequence[str], *, key: str) -> Dataset:
    """The dataset of the `data` section, once for each folder, joined.

    Raises:
        UserError: no folder is given, or the data in one is wrong.
    """
    from torch.utils.data import ConcatDataset

    from sgm.util import instantiate_from_config

    if not folders:
        raise UserError(f"args.{key} is empty; it must name at least one folder of data")
    if not config.data:
        raise UserError("the configuration has no section 'data'; add one with a target")
    parts = []
    for name in folders:
        place = Path(name).expanduser()
        if not place.exists():
            raise UserError(
                f"args.{key}: {name} does not exist; check the path (clips to try the bundled "
                f"model on: python -m tools.tiny.draw_clips --output {name} --count 64)"
            )
        parts.append(instantiate_from_config(config.data, data_dir=str(place)))
    return ConcatDataset(parts)


def checked_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of an epoch.

    Raises:
        UserError: clips of a batch differ in length, or a worker process found the data unusable.
    """
    try:
        yield from loader
    except UserError as error:
        # From a worker it comes with that process's stack trace, and the sentence last.
        sentence = str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]
        raise UserError(sentence) from None
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise UserError(
            f"clips of different lengths cannot share a batch of {loader.batch_size}; set "
            "train_micro_batch_size_per_gpu and eval_batch_size to 1, or lower max_num_frames"
        ) from None


def endless_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Batches for ever, epoch after epoch, each in another order."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from checked_batches(loader)


def build_loader(dataset: Dataset, config: Config, *, batch_size: int) -> DataLoader:
    """Shuffled batches; every rank gets its own part of the data."""
    import torch
    from torch import distributed
    from torch.utils.data import DataLoader, DistributedSampler

    sampler = DistributedSampler(
        dataset,
        num_replicas=distributed.get_world_size(),
        rank=distributed.get_rank(),
        seed=config.args.seed,
    )
    workers = min(config.args.num_workers, os.cpu_count() or 1)
    if len(sampler) < batch_size:
        raise UserError(
            f"the training data holds {len(sampler)} samples for a process, fewer than the batch "
            f"of {batch_size}; lower train_micro_batch_size_per_gpu or add data"
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        generator=torch.Generator().manual_seed(config.args.seed),
    )


def build_sat_optimizer(weights: Sequence[torch.nn.Parameter], **params: Any) -> Any:
    """SAT's fused Adam, whose CUDA code is compiled the first time.

    Raises:
        UserError: it cannot be compiled here.
    """
    from sat import ops

    try:
        return ops.FusedEmaAdam(weights, **params)
    except (IndexError, OSError, RuntimeError, AssertionError, SubprocessError) as error:
        logger.debug("%s", SAT_OPTIMIZER, exc_info=True)
        raise UserError(
            f"deepspeed.optimizer.type: {SAT_OPTIMIZER} cannot be compiled here "
            f"({type(error).__name__}); it needs a GPU and nvcc; without them use type: AdamW"
        ) from None


def start_deepspeed(engine: SATVideoDiffusionEngine, config: Config) -> Any:
    """DeepSpeed's engine around ours, with the `deepspeed` section as its settings.

    Raises:
        UserError: nothing is trained, or DeepSpeed refuses its settings.
    """
    import deepspeed

    trained = [weight for weight in engine.parameters() if weight.requires_grad]
    if not trained:
        raise UserError("no weight is trained; check not_trainable_prefixes and lora_config")
    logger.info(
        "training %.2f M of %.2f M parameters",
        sum(weight.numel() for weight in trained) / 1e6,
        sum(weight.numel() for weight in engine.parameters()) / 1e6,
    )
    # DeepSpeed insists on what launchers set, also for a process that was started without one.
    os.environ.setdefault("LOCAL_RANK", "0")
    settings = dict(config.deepspeed)
    # Sampling's precision flags say nothing about training: DeepSpeed's own sections do.
    optimizer = None
    if settings["optimizer"]["type"] == SAT_OPTIMIZER:
        # DeepSpeed knows its own and PyTorch's optimizers by name; SAT's is handed to it ready.
        params = settings.pop("optimizer").get("params") or {}
        optimizer = functools.partial(build_sat_optimizer, **params)
    try:
        wrapped, *_ = deepspeed.initialize(
            model=engine, model_parameters=trained, optimizer=optimizer, config=settings
        )
    except (
        *(ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError),
        deepspeed.DeepSpeedConfigError,
    ) as error:
        logger.debug("deepspeed.initialize", exc_info=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise UserError(
            f"deepspeed refuses its settings: {type(error).__name__}: {reason}; change them in "
            "the section deepspeed"
        ) from None
    return wrapped


def save_checkpoint(engine: SATVideoDiffusionEngine, folder: Path, iteration: int) -> None:
    """Write ``{folder}/{iteration}/mp_rank_00_model_states.pt`` and point ``latest`` to it.

    Saved are the transformer and whatever else was trained, in the layout that `load` reads. The
    file gets its name only when it is whole, and ``latest`` changes after that.

    Raises:
        UserError: the files cannot be written.
    """
    trained = {name for name, weight in engine.named_parameters() if weight.requires_grad}
    state = {
        name: tensor.cpu()
        for name, tensor in engine.state_dict().items()
        if name.startswith("model.diffusion_model.") or name in trained
    }
    path = folder / str(iteration) / "mp_rank_00_model_states.pt"
    make_output_folder(path.parent)
    save_torch({"module": state}, path)
    with replacing(folder / "latest") as partial:
        partial.write_text(str(iteration), "utf-8")
    logger.info("saved %s", path)


class Validation:
    """The loss on validation data, at noise and noise levels that are the same every time."""

    def __init__(self, config: Config) -> None:
        from torch.utils.data import DataLoader

        args = config.args
        dataset = build_dataset(config, args.valid_data, key="valid_data")
        self.loader = DataLoader(dataset, batch_size=args.eval_batch_size)
        self.num_batches = args.eval_iters
        self.seed = args.seed

    def loss(self, engine: SATVideoDiffusionEngine) -> float:
        """Mean loss over the first `eval_iters` batches."""
        import torch

        engine.eval()
        losses = []
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for batch in itertools.islice(checked_batches(self.loader), self.num_batches):
                losses.append(float(engine(batch)))
        engine.train()
        return sum(losses) / len(losses)


def make_run_folder(args: TrainingArgs) -> Path:
    """The run's folder, made by rank 0; its name has the time, so the others ask for it.

    Raises:
        UserError: it cannot be made, or holds a run already.
    """
    import torch
    from torch import distributed

    names = [f"{args.experiment_name}-{datetime.now():%m-%d-%H-%M}"]
    if distributed.get_rank() == 0:
        folder = make_output_folder(Path(args.save).expanduser()) / names[0]
        try:
            folder.mkdir()  # also tells two runs apart that start at once
        except FileExistsError:
            raise UserError(
                f"{folder} belongs to another run; wait a minute or change experiment_name"
            ) from None
    distributed.broadcast_object_list(names, src=0, device=torch.device("cpu"))
    return Path(args.save).expanduser() / names[0]


def save_config(config: Config, folder: Path) -> None:
    """Write ``training_config.yaml``, which says all that the run was started with.

    Raises:
        UserError: it cannot be written.
    """
    from omegaconf import OmegaConf

    sections = {"model": config.model, "data": config.data, "deepspeed": config.deepspeed}
    with replacing(folder / "training_config.yaml") as partial:
        OmegaConf.save(OmegaConf.create({"args": vars(config.args), **sections}), partial)


def train(
    wrapped: Any,
    loader: DataLoader,
    *,
    config: Config,
    validation: Validation | None,
    folder: Path,
) -> None:
    """The training loop: `train_iters` optimizer steps, with logging, validation and saving.

    Raises:
        UserError: a checkpoint cannot be written.
    """
    from torch import distributed

    args = config.args
    batches = endless_batches(loader)
    started, logged_at, recent = time.monotonic(), 0, []
    for iteration in range(1, args.train_iters + 1):
        for _ in range(wrapped.gradient_accumulation_steps()):
            loss = wrapped(next(batches))
            wrapped.backward(loss)
            wrapped.step()
            recent.append(loss.detach())
        if iteration % args.log_interval == 0 or iteration == args.train_iters:
            now = time.monotonic()
            seconds = (now - started) / (iteration - logged_at)
            mean = sum(float(value) for value in recent) / len(recent)
            logger.info(
                "step %d of %d: loss %.4f, lr %.2e, %.3f s a step, %.0f s left",
                iteration,
                args.train_iters,
                mean,
                wrapped.get_lr()[0],
                seconds,
                seconds * (args.train_iters - iteration),
            )
            started, logged_at, recent = now, iteration, []
        if validation and (iteration % args.eval_interval == 0 or iteration == args.train_iters):
            value = validation.loss(wrapped.module)
            logger.info("step %d: validation loss %.4f", iteration, value)
        if iteration % args.save_interval == 0 or iteration == args.train_iters:
            if distributed.get_rank() == 0:
                save_checkpoint(wrapped.module, folder, iteration)
            distributed.barrier()


def check(config: Config) -> None:
    """All that can be found wrong before data and weights are read.

    Raises:
        UserError: a value or a path is wrong.
    """
    check_args(config.args)
    check_deepspeed(config.deepspeed)
    check_video_data(config.data, config.model)
    from_nothing = config.args.mode == "pretrain"
    if not (config.args.load or from_nothing):
        raise UserError(
            "args.load is not set: it must name the folder of the transformer's weights; "
            "use mode: pretrain to start from random ones"
        )
    check_weight_paths(config.model, config.args.load, random_transformer=from_nothing)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, load, train; returns the exit code."""
    config = parse_config(TrainingArgs, "Train the transformer.", argv)
    set_up_logging()
    check(config)

    import torch

    from sample_video import Rank, choose_device
    from sgm.modules.transformer.sat_runtime import ensure_process_groups
    from sgm.util import allow_targets

    args = config.args
    allow_targets(config.allow_target)
    device = choose_device(args, Rank.from_environment())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ensure_process_groups()
    torch.manual_seed(args.seed)
    dataset = build_dataset(config, args.train_data, key="train_data")
    validation = Validation(config) if args.valid_data else None
    batch_size = config.deepspeed.get("train_micro_batch_size_per_gpu", 1)
    loader = build_loader(dataset, config, batch_size=batch_size)
    folder = make_run_folder(args)
    engine = load_engine(config, device)
    wrapped = start_deepspeed(engine, config)
    # Ranks draw different noise, whatever was drawn alike while building.
    torch.manual_seed(args.seed + torch.distributed.get_rank())
    if torch.distributed.get_rank() == 0:
        save_config(config, folder)
    train(wrapped, loader, config=config, validation=validation, folder=folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
