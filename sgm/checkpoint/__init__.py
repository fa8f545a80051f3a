"""Reading weights: what a file is, what it holds, and whether it fits the model."""

from sgm.checkpoint.lora import load_lora, lora_record, merge_lora, read_lora
from sgm.checkpoint.reading import read_checkpoint
from sgm.checkpoint.transformer import (
    find_transformer_file,
    fingerprint,
    is_lora_matrix,
    load_transformer,
)
from sgm.checkpoint.vae import load_vae_state

__all__ = [
    "find_transformer_file",
    "fingerprint",
    "is_lora_matrix",
    "load_lora",
    "load_transformer",
    "load_vae_state",
    "lora_record",
    "merge_lora",
    "read_checkpoint",
    "read_lora",
]
