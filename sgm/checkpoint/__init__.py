"""Reading weights: what a file is, what it holds, and whether it fits the model."""

from sgm.checkpoint.lora import (
    load_lora,
    lora_record,
    read_lora,
)
from sgm.checkpoint.lora_merging import merge_loras, merged_tensors
from sgm.checkpoint.reading import read_checkpoint
from sgm.checkpoint.transformer import (
    check_transformer,
    find_transformer_file,
    fingerprint,
    is_lora_matrix,
    load_transformer,
    read_transformer,
)
from sgm.checkpoint.vae import load_vae_state, vae_files
from sgm.lora_choice import LoraChoice

__all__ = [
    "LoraChoice",
    "check_transformer",
    "find_transformer_file",
    "fingerprint",
    "is_lora_matrix",
    "load_lora",
    "load_transformer",
    "load_vae_state",
    "lora_record",
    "merge_loras",
    "merged_tensors",
    "read_checkpoint",
    "read_lora",
    "read_transformer",
    "vae_files",
]
