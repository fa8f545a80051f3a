"""Reading weights: what a file is, what it holds, and whether it fits the model."""

from sgm.checkpoint.reading import read_checkpoint
from sgm.checkpoint.transformer import find_transformer_file, load_transformer
from sgm.checkpoint.vae import load_vae_state

__all__ = ["find_transformer_file", "load_transformer", "load_vae_state", "read_checkpoint"]
