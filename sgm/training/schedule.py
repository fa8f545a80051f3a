"""The learning rate over the steps of a run, as SAT sets it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from sgm.modules.transformer.sat_runtime import quiet_sat

# Share of the learning rate in the first `auto_warmup_steps`, while Adam's moments settle.
AUTO_WARMUP_RATE = 0.05
_NO_WARMUP = 1e-9  # steps: SAT divides by the length of the warm-up


def build_schedule(optimizer: Optimizer, args: Any, *, learning_rate: float) -> Any:
    """SAT's schedule, set to the first step; its `step()` is to follow each optimizer step.

    The rate rises over the share `warmup` of the steps, then stays, falls in a line to 0, or as a
    cosine to `lr_decay_ratio`. In the first `auto_warmup_steps` it is 5% at most.

    Args:
        optimizer: its parameter groups must hold factors of the learning rate as ``lr``.
        args: lr_decay_style, lr_decay_iters, lr_decay_ratio, warmup, auto_warmup_steps,
            train_iters.
        learning_rate: the highest.
    """
    from sat.training.learning_rates import AnnealingLR

    steps = args.lr_decay_iters or args.train_iters
    with quiet_sat():
        return AnnealingLR(
            optimizer,
            start_lr=learning_rate,
            warmup_iter=max(args.warmup * steps, _NO_WARMUP),
            num_iters=steps,
            decay_style=args.lr_decay_style,
            last_iter=0,
            decay_ratio=args.lr_decay_ratio,
            auto_warmup_steps=args.auto_warmup_steps,
            auto_warmup_rate=AUTO_WARMUP_RATE,
        )
