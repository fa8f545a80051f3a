"""The JSON files of a diffusers folder of CogVideoX-2B: sizes from the weights, the rest given.

Written are the keys that the first release with these classes knew; what later ones added has the
2B model's value as its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgm.checkpoint.diffusers_folder import PART_CLASSES
from sgm.errors import UserError

DIFFUSERS_VERSION = "0.30.0"  # the first release with these classes
# Class of our sampler → class of diffusers' scheduler.
SCHEDULERS = {
    "VPSDEDPMPP2MSampler": "CogVideoXDPMScheduler",
    "VideoDDIMSampler": "CogVideoXDDIMScheduler",
}


@dataclass(frozen=True)
class Geometry:
    """What the weights do not tell, of a model as a configuration describes it.

    Args:
        latent_height, latent_width: of a latent frame.
        num_frames: video frames of the longest clip.
        time_compressed_rate: video frames per latent frame, after the first.
        text_length: tokens of a text.
        interpolation: divisor of the patches' rows and columns in the position table.
    """

    latent_height: int
    latent_width: int
    num_frames: int
    time_compressed_rate: int
    text_length: int
    interpolation: float


def geometry_of(network: Mapping[str, Any]) -> Geometry:
    """What the params of `network_config` say that weights cannot; they have been built once.

    Raises:
        UserError: diffusers cannot express it.
    """
    position = network["modules"]["pos_embed_config"]["params"]
    factors = [position.get(f"{side}_interpolation", 1.0) for side in ("height", "width")]
    if factors[0] != factors[1]:
        raise UserError(
            f"height_interpolation={factors[0]} and width_interpolation={factors[1]} differ; "
            "diffusers has one factor for both, so this model cannot be converted"
        )
    return Geometry(
        latent_height=network["latent_height"],
        latent_width=network["latent_width"],
        num_frames=network["num_frames"],
        time_compressed_rate=network["time_compressed_rate"],
        text_length=position["text_length"],
        interpolation=float(factors[0]),
    )


def transformer_config(sizes: Mapping[str, int], geometry: Geometry) -> dict[str, Any]:
    """``transformer/config.json``."""
    return {
        "_class_name": PART_CLASSES["transformer"],
        "_diffusers_version": DIFFUSERS_VERSION,
        **sizes,
        "sample_height": geometry.latent_height,
        "sample_width": geometry.latent_width,
        "sample_frames": geometry.num_frames,
        "temporal_compression_ratio": geometry.time_compressed_rate,
        "max_text_seq_length": geometry.text_length,
        "spatial_interpolation_scale": geometry.interpolation,
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
    sizes: Mapping[str, Any], geometry: Geometry, *, scaling_factor: float
) -> dict[str, Any]:
    """``vae/config.json``; latents are multiplied by `scaling_factor` after encoding."""
    num_levels = len(sizes["block_out_channels"])
    scale = 2 ** (num_levels - 1)  # every level but the last halves the picture
    return {
        "_class_name": PART_CLASSES["vae"],
        "_diffusers_version": DIFFUSERS_VERSION,
        **sizes,
        "down_block_types": ["CogVideoXDownBlock3D"] * num_levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * num_levels,
        "sample_height": geometry.latent_height * scale,
        "sample_width": geometry.latent_width * scale,
        "temporal_compression_ratio": geometry.time_compressed_rate,
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
    """``scheduler/scheduler_config.json``: the noise levels of `ZeroSNRDDPMDiscretization`."""
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
    """``tokenizer/tokenizer_config.json`` beside the tokenizer's own file."""
    return {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": text_length,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        # T5's marks of left-out text. A prompt that holds such letters means the letters.
        "extra_ids": 0,
        "additional_special_tokens": [],
    }


def model_index(scheduler: str, *, transformer: bool, vae: bool, text: bool) -> dict[str, Any]:
    """``model_index.json`` of a pipeline with the parts that are given."""

    def entry(given: bool, library: str, class_name: str) -> list[str | None]:
        return [library, class_name] if given else [None, None]

    return {
        "_class_name": "CogVideoXPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": entry(text, "transformers", "T5EncoderModel"),
        "tokenizer": entry(text, "transformers", "T5Tokenizer"),
        "transformer": entry(transformer, "diffusers", PART_CLASSES["transformer"]),
        "vae": entry(vae, "diffusers", PART_CLASSES["vae"]),
    }
