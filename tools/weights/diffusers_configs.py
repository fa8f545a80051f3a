"""Build the contents of the JSON files in a diffusers folder of CogVideoX-2B.

The files have the keys of the first diffusers release with these classes. Later releases added
keys, whose defaults are the values of the 2B model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sgm.checkpoint.diffusers_folder import PART_CLASSES
from sgm.errors import UserError

DIFFUSERS_VERSION = "0.30.0"  # the first release with these classes
# Class of the sampler here → class of the scheduler in diffusers.
SCHEDULERS = {
    "VPSDEDPMPP2MSampler": "CogVideoXDPMScheduler",
    "VideoDDIMSampler": "CogVideoXDDIMScheduler",
}


def geometry_of(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of clips and prompts, with the keys of diffusers' config.json.

    These sizes cannot be derived from the weights.

    Args:
        network: the `params` of a `network_config` from which a network was built without an error.

    Raises:
        UserError: diffusers cannot express the interpolation factors.
    """
    position = network["modules"]["pos_embed_config"]["params"]
    height, width = (position.get(f"{side}_interpolation", 1.0) for side in ("height", "width"))
    if height != width:
        raise UserError(
            f"height_interpolation={height} and width_interpolation={width} differ, but diffusers "
            "has one factor for both; this model cannot be converted"
        )
    return {
        "sample_height": network["latent_height"],
        "sample_width": network["latent_width"],
        "sample_frames": network["num_frames"],
        "temporal_compression_ratio": network["time_compressed_rate"],
        "max_text_seq_length": position["text_length"],
        "spatial_interpolation_scale": float(height),
    }


def transformer_config(sizes: Mapping[str, int], geometry: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``transformer/config.json``.

    Args:
        sizes: the sizes of the weights, as returned by `tools.weights.sizes.sizes_of`.
        geometry: the sizes of clips and prompts, as returned by `geometry_of`.
    """
    return {
        "_class_name": PART_CLASSES["transformer"],
        "_diffusers_version": DIFFUSERS_VERSION,
        **sizes,
        **geometry,
        "temporal_interpolation_scale": 1.0,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "attention_bias": True,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "use_rotary_positional_embeddings": False,
    }


def vae_config(
    sizes: Mapping[str, Any], geometry: Mapping[str, Any], *, scaling_factor: float
) -> dict[str, Any]:
    """Return ``vae/config.json``.

    `sizes` and `geometry` have the same sources as in `transformer_config`. Latents are multiplied
    by `scaling_factor` after encoding.
    """
    num_levels = len(sizes["block_out_channels"])
    scale = 2 ** (num_levels - 1)  # each resolution level except the last halves height and width
    return {
        "_class_name": PART_CLASSES["vae"],
        "_diffusers_version": DIFFUSERS_VERSION,
        **sizes,
        "down_block_types": ["CogVideoXDownBlock3D"] * num_levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * num_levels,
        "sample_height": geometry["sample_height"] * scale,
        "sample_width": geometry["sample_width"] * scale,
        "temporal_compression_ratio": geometry["temporal_compression_ratio"],
        "scaling_factor": scaling_factor,
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def scheduler_config(class_name: str, *, snr_shift_scale: float) -> dict[str, Any]:
    """Return ``scheduler/scheduler_config.json`` for `ZeroSNRDDPMDiscretization`'s noise levels."""
    return {
        "_class_name": class_name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": snr_shift_scale,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
    }


def tokenizer_config(text_length: int) -> dict[str, Any]:
    """Return ``tokenizer/tokenizer_config.json`` for prompts of `text_length` tokens."""
    return {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": text_length,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        # No sentinel tokens (<extra_id_0> …): a prompt may contain these strings as plain text.
        "extra_ids": 0,
        "additional_special_tokens": [],
    }


def model_index(scheduler: str, present: Collection[str]) -> dict[str, Any]:
    """Return the ``model_index.json`` of a pipeline.

    Args:
        scheduler: the class of the scheduler in diffusers.
        present: the names of the pipeline's parts, besides the scheduler.
    """
    classes: dict[str, list[str]] = {
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        **{part: ["diffusers", name] for part, name in PART_CLASSES.items()},
    }
    return {
        "_class_name": "CogVideoXPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        **{part: entry if part in present else [None, None] for part, entry in classes.items()},
    }
