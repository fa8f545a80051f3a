"""The toy world of CogVideoX-tiny: one coloured shape moving on a plain background.

This module has the grammar of captions, functions that draw clips, and the dataset `ShapeClips`,
which draws clips on the fly. A clip has 17 frames of 64 x 96 (h x w); y grows downwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

NUM_FRAMES, HEIGHT, WIDTH, FPS = 17, 64, 96, 8

# Softened primary colours, which H.264 and the VAE reproduce without clipping at 0 or 255.
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 210, 50),
    "cyan": (50, 210, 220),
    "magenta": (210, 60, 200),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
BACKGROUNDS = {"black": (12, 12, 12), "gray": (128, 128, 128), "white": (244, 244, 244)}

# Ranges of radius (in pixels) and of speed (in pixels per frame), by the word in the caption. None:
# the caption has no word for it.
# Shapes are large because the autoencoder halves height and width three times. The corners of
# smaller shapes would be too faint in the latents to be learnt in minutes.
# The largest shape at the highest speed still fits: 2 * 21 * 1.04 + 0.9 * 16 + 2 * MARGIN < HEIGHT.
SIZES = {None: (16.0, 21.0), "small": (16.0, 17.5), "large": (19.5, 21.0)}
SPEEDS = {None: (0.4, 0.9), "slowly": (0.4, 0.55), "quickly": (0.75, 0.9)}
MARGIN = 1.0

WORDINGS = (
    "{subject} moving {motion} on a {background} background",
    "on a {background} background, {subject} is moving {motion}",
    "{subject} moves {motion} across a {background} background",
    "a {background} background with {subject} moving {motion}",
)

# Half sizes of the shapes for radius 1, chosen so that all three shapes look about equally large.
_SQUARE_HALF = 0.9
_TRIANGLE_HALF_WIDTH = 1.2
_TRIANGLE_HALF_HEIGHT = _TRIANGLE_HALF_WIDTH * 3**0.5 / 2  # equilateral, apex up
HALF_EXTENTS = {  # (x, y)
    "circle": (1.0, 1.0),
    "square": (_SQUARE_HALF, _SQUARE_HALF),
    "triangle": (_TRIANGLE_HALF_WIDTH, _TRIANGLE_HALF_HEIGHT),
}
UNIT_AREAS = {
    "circle": np.pi,
    "square": 4 * _SQUARE_HALF**2,
    "triangle": 2 * _TRIANGLE_HALF_WIDTH * _TRIANGLE_HALF_HEIGHT,
}
# Distance of the centre of mass below the centre of the bounding box, for radius 1.
CENTROID_OFFSETS = {"circle": 0.0, "square": 0.0, "triangle": _TRIANGLE_HALF_HEIGHT / 3}

HELD_OUT_FILE = Path(__file__).with_name("held_out.txt")


@dataclass(frozen=True)
class ShapeSpec:
    """The attributes in a caption, as words of the grammar."""

    color: str
    shape: str
    direction: str
    background: str
    size: str | None = None
    speed: str | None = None

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """The four attributes that decide whether a clip is held out."""
        return self.color, self.shape, self.direction, self.background

    def caption(self, wording: int = 0) -> str:
        """Return the caption in a wording of `WORDINGS`, by index; 0 is the canonical wording."""
        subject = " ".join(filter(None, ("a", self.size, self.color, self.shape)))
        motion = " ".join(filter(None, (self.direction, self.speed)))
        return WORDINGS[wording].format(subject=subject, motion=motion, background=self.background)


_VOCABULARY = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(filter(None, SIZES)),
    "speed": tuple(filter(None, SPEEDS)),
}
_OPTIONAL = ("size", "speed")


def parse_caption(caption: str) -> ShapeSpec:
    """Return the attributes in a caption of any wording.

    Raises:
        ValueError: an attribute is missing or given twice.
    """
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    found: dict[str, str | None] = {}
    for field, allowed in _VOCABULARY.items():
        said = [word for word in words if word in allowed]
        if len(said) > 1 or (not said and field not in _OPTIONAL):
            raise ValueError(
                f"caption {caption!r} names {field} {len(said)} times; it must contain exactly "
                f"one of {', '.join(allowed)}"
            )
        found[field] = said[0] if said else None
    return ShapeSpec(**found)


def all_combinations() -> list[ShapeSpec]:
    """Return all 216 combinations of colour, shape, direction, background, in a fixed order."""
    return [ShapeSpec(*c) for c in itertools.product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS)]


def held_out_combinations() -> list[ShapeSpec]:
    """Return the 44 combinations in `HELD_OUT_FILE`, which training never sees.

    For each pair of attribute values (red circle, circle on gray, …), at least 60% of the
    combinations with this pair are used in training; tests/tools/tiny/test_shapes.py checks this.
    """
    return [parse_caption(line) for line in HELD_OUT_FILE.read_text("utf-8").splitlines()]


def training_combinations() -> list[ShapeSpec]:
    """Return the 172 combinations that are not held out."""
    held_out = set(held_out_combinations())
    return [spec for spec in all_combinations() if spec not in held_out]


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Return the distance in pixels to the outline of `shape`, positive inside.

    `dx` and `dy` are measured from the centre of the bounding box. The distance is exact inside and
    along edges. Beyond a corner, it is the distance to the line through the nearer edge, which is
    accurate enough for anti-aliasing of one pixel.
    """
    if shape == "circle":
        return radius - np.sqrt(dx * dx + dy * dy)
    if shape == "square":
        return _SQUARE_HALF * radius - np.maximum(np.abs(dx), np.abs(dy))
    half_height = _TRIANGLE_HALF_HEIGHT * radius
    sides = (dy + half_height) * 0.5 - np.abs(dx) * (3**0.5 / 2)
    return np.minimum(half_height - dy, sides)


def coverage(
    shape: str, center_x: np.ndarray, center_y: np.ndarray, *, radius: float | np.ndarray
) -> np.ndarray:
    """Return the fraction of each pixel that a shape covers, for (t,) centres of its bounding box.

    Returns:
        float32 (t, 64, 96) in [0, 1].
    """
    x = np.arange(WIDTH, dtype=np.float32) + 0.5  # pixel centres
    y = np.arange(HEIGHT, dtype=np.float32) + 0.5
    dx = (x[None, :] - np.asarray(center_x)[:, None]).astype(np.float32)[:, None, :]
    dy = (y[None, :] - np.asarray(center_y)[:, None]).astype(np.float32)[:, :, None]
    return np.clip(signed_distance(shape, dx, dy, radius) + 0.5, 0, 1)


def draw_clip(spec: ShapeSpec, rng: np.random.Generator) -> np.ndarray:
    """Draw one clip and return it as uint8 (17, 64, 96, 3), RGB.

    Radius, speed and start are drawn uniformly such that the shape stays inside the frame.
    """
    radius = np.float32(rng.uniform(*SIZES[spec.size]))
    travel = rng.uniform(*SPEEDS[spec.speed]) * (NUM_FRAMES - 1)
    step = np.linspace(-0.5, 0.5, NUM_FRAMES) * travel
    centers = []
    for axis, length in enumerate((WIDTH, HEIGHT)):
        sign = DIRECTIONS[spec.direction][axis]
        reach = MARGIN + radius * HALF_EXTENTS[spec.shape][axis] + abs(sign) * travel / 2
        centers.append(rng.uniform(reach, length - reach) + sign * step)
    mask = coverage(spec.shape, centers[0], centers[1], radius=radius)
    # Blend with a lookup table, because uint8 has at most 256 shades from background to colour.
    shade = np.linspace(0, 1, 256)[:, None]
    ends = np.array(BACKGROUNDS[spec.background]), np.array(COLORS[spec.color])
    table = np.rint(ends[0] * (1 - shade) + ends[1] * shade).astype(np.uint8)
    return table.take(np.rint(mask * 255).astype(np.uint8), axis=0)


def clip_to_tensor(frames: np.ndarray) -> torch.Tensor:
    """Convert uint8 (t, h, w, c) to float32 (t, c, h, w) in [-1, 1]."""
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()  # (t, c, h, w)
    return planes.float().div_(127.5).sub_(1)


class ShapeClips(Dataset):
    """Clips drawn on the fly; each item depends only on the seed and on its index.

    Items are ``{"mp4": float32 (17, 3, 64, 96) in [-1, 1], "txt": caption}``. Some captions name
    size or speed, or use a wording other than the canonical one.

    Args:
        num_clips: number of items.
        seed: each seed gives different clips.
        held_out: draw the 44 held-out combinations instead of the 172 training combinations.
        combinations: draw these combinations; `held_out` is then ignored.
    """

    MENTION_PROBABILITY = 0.25
    CANONICAL_PROBABILITY = 0.6

    def __init__(
        self,
        num_clips: int,
        seed: int,
        *,
        held_out: bool = False,
        combinations: Sequence[ShapeSpec] | None = None,
    ) -> None:
        self.num_clips = num_clips
        self.seed = seed
        if combinations is None:
            combinations = held_out_combinations() if held_out else training_combinations()
        self.combinations = combinations

    def __len__(self) -> int:
        return self.num_clips

    def caption(self, index: int) -> str:
        """Return the caption of clip `index`, without drawing the clip. Raises IndexError."""
        spec, wording, _ = self._describe(index)
        return spec.caption(wording)

    def draw(self, index: int) -> tuple[np.ndarray, str]:
        """Draw clip `index`: uint8 (17, 64, 96, 3), and its caption. Raises IndexError."""
        spec, _, rng = self._describe(index)
        return draw_clip(spec, rng), self.caption(index)

    def _describe(self, index: int) -> tuple[ShapeSpec, int, np.random.Generator]:
        """Return the attributes of clip `index`, its wording, and the generator for drawing it."""
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} does not exist; there are {self.num_clips} clips")
        rng = np.random.default_rng((self.seed, index))
        combination = self.combinations[rng.integers(len(self.combinations))].combination
        is_said = [rng.random() < self.MENTION_PROBABILITY for _ in _OPTIONAL]
        fields = list(itertools.compress(_OPTIONAL, is_said))
        extras = {field: str(rng.choice(_VOCABULARY[field])) for field in fields}
        spec = ShapeSpec(*combination, **extras)
        canonical = rng.random() < self.CANONICAL_PROBABILITY
        wording = 0 if canonical else int(rng.integers(1, len(WORDINGS)))
        return spec, wording, rng

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        """Draw clip `index` for training. Raises IndexError."""
        frames, caption = self.draw(index)
        return {"mp4": clip_to_tensor(frames), "txt": caption}
