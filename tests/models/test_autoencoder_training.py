"""Training of the video autoencoder, with Lightning and without."""

import math

import pytest
import torch
from pytorch_lightning import Trainer

from sgm.models.autoencoder_training import TrainableVideoAutoencoder
from sgm.util import instantiate_from_config
from tests.models.test_autoencoder import WIDTHS_TINY, node


def tiny_vae() -> TrainableVideoAutoencoder:
    torch.manual_seed(0)
    target = "sgm.models.autoencoder_training.TrainableVideoAutoencoder"
    return instantiate_from_config(node(WIDTHS_TINY) | {"target": target})


def test_training_lowers_the_loss_and_the_kl_term_counts():
    vae = tiny_vae()
    vae.learning_rate = vae.kl_weight = 1e-3
    optimizer = vae.configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == 1e-3
    batch = {"mp4": torch.rand(1, 9, 3, 16, 16) * 2 - 1, "txt": ["noise"]}
    losses = []
    for index in range(6):
        loss = vae.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
        optimizer.step()
        losses.append(loss.item())
    # The latents' noise moves the loss by a few percent a step.
    assert losses[-1] < 0.95 * losses[0]

    vae.kl_weight = 1e6
    assert vae.training_step(batch, 0).item() > 100 * losses[0]


def test_training_loss_is_that_of_the_streamed_decode(monkeypatch):
    vae = tiny_vae()
    vae.kl_weight = 0.0
    video = torch.zeros(1, 3, 9, 16, 16)
    monkeypatch.setattr(vae, "decode", lambda z: video + 0.5)
    batch = {"mp4": torch.zeros(1, 9, 3, 16, 16)}
    # Everywhere off by one half: |error| + error² = 0.5 + 0.25
    assert math.isclose(vae.training_step(batch, 0).item(), 0.75, rel_tol=1e-6)


def test_lightning_trains_it_and_logs_the_terms():
    vae = tiny_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    clips = [{"mp4": torch.rand(9, 3, 8, 8) * 2 - 1} for _ in range(2)]
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(vae, torch.utils.data.DataLoader(clips, batch_size=2))
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged.keys() == {"train/l1", "train/mse", "train/kl", "train/loss"}
    expected = logged["train/l1"] + logged["train/mse"] + vae.kl_weight * logged["train/kl"]
    assert logged["train/loss"] == pytest.approx(expected)
    assert any(not torch.equal(before[name], value) for name, value in vae.state_dict().items())
