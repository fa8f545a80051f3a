"""Measure colour, shape, direction and background in a video from its pixels.

The measurement uses the palette and outlines of `shapes.py`, but not the video's caption. The value
of an unclear attribute is None, so a blurred or empty video does not count as correct.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tools.tiny.shapes import (
    BACKGROUNDS,
    CENTROID_OFFSETS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    UNIT_AREAS,
    ShapeSpec,
    signed_distance,
)

ATTRIBUTES = ("color", "shape", "direction", "background")

# Distances in RGB. Any two colours of the palette are at least 130 apart, and any two backgrounds
# 200. So at most one entry is closer than half of that.
MAX_COLOR_DISTANCE = 65.0
MAX_BACKGROUND_DISTANCE = 65.0
MIN_CONTRAST = 40.0  # between shape and background
BORDER = 2  # pixels at the frame's edge, which nearly always show the background

MIN_AREA = 40.0  # in pixels; the smallest drawn shape has 160
MIN_VISIBLE_FRACTION = 0.9  # of the frames
# Overlap (intersection over union) with an ideal outline of the same area and centre. Drawn shapes
# have at least 0.98, or 0.87 after H.264. A triangle and a square of equal area have only 0.71.
MIN_OVERLAP = 0.8
MIN_SPEED = 0.3  # pixels per frame; drawn shapes move by at least 0.6
MAX_DRIFT = 0.5  # speed across the direction, as a fraction of the speed along it


@dataclass(frozen=True)
class Measurement:
    """The four attributes, in the words of captions. Attributes that are unclear are None."""

    color: str | None
    shape: str | None
    direction: str | None
    background: str | None

    def matches(self, spec: ShapeSpec) -> dict[str, bool]:
        """Return for each of `ATTRIBUTES` whether the measured value equals that in `spec`."""
        return {name: getattr(self, name) == getattr(spec, name) for name in ATTRIBUTES}


def measure(video: np.ndarray) -> Measurement:
    """Measure the attributes of a video, uint8 (t, h, w, 3), RGB."""
    pixels = video.astype(np.float32)
    background = _background(pixels)
    contrast = np.linalg.norm(pixels - background, axis=3)  # (t, h, w)
    peak = float(np.percentile(contrast, 99))  # every drawn shape covers more than one percent
    background_name = _nearest(background, BACKGROUNDS, MAX_BACKGROUND_DISTANCE)
    if peak < MIN_CONTRAST:
        return Measurement(None, None, None, background_name)
    color = np.median(pixels[contrast > 0.75 * peak], axis=0)
    axis = color - background
    # Pixels more than halfway from background to colour belong to the shape: bool (t, h, w).
    mask = (pixels - background) @ axis > 0.5 * (axis @ axis)
    color_name = _nearest(color, COLORS, MAX_COLOR_DISTANCE)
    return Measurement(color_name, *_shape_and_direction(mask), background_name)


def _background(pixels: np.ndarray) -> np.ndarray:
    """Return the median colour at the border of all frames, (3,)."""
    is_border = np.ones(pixels.shape[1:3], dtype=bool)
    is_border[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(pixels[:, is_border].reshape(-1, 3), axis=0)


def _nearest(
    rgb: np.ndarray, palette: Mapping[str, tuple[int, int, int]], limit: float
) -> str | None:
    """Return the name of the nearest colour in `palette`; None if it is farther than `limit`."""
    distances = {name: float(np.linalg.norm(rgb - value)) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= limit else None


def _shape_and_direction(mask: np.ndarray) -> tuple[str | None, str | None]:
    """Return the name and the direction of the shape in `mask` (t, h, w), each None if unclear."""
    areas = mask.sum(axis=(1, 2)).astype(np.float64)
    visible = np.flatnonzero(areas >= MIN_AREA)
    if len(visible) < max(2, MIN_VISIBLE_FRACTION * len(mask)):
        return None, None
    mask, areas = mask[visible], areas[visible]
    x = np.arange(mask.shape[2]) + 0.5  # pixel centres
    y = np.arange(mask.shape[1]) + 0.5
    center_x = (mask.sum(axis=1) @ x) / areas  # (t,)
    center_y = (mask.sum(axis=2) @ y) / areas
    dx = x[None, None, :] - center_x[:, None, None]  # (t, 1, w)
    dy = y[None, :, None] - center_y[:, None, None]  # (t, h, 1)
    return _shape(mask, areas, dx, dy), _direction(visible, center_x, center_y)


def _shape(mask: np.ndarray, areas: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> str | None:
    """Return the shape whose ideal outline has the best median overlap; None if too low.

    The ideal outline has the area and the centre of mass of the measured shape.
    """
    overlaps = {}
    for shape in SHAPES:
        radius = np.sqrt(areas / UNIT_AREAS[shape])[:, None, None]  # (t, 1, 1)
        ideal = signed_distance(shape, dx, dy + CENTROID_OFFSETS[shape] * radius, radius) > 0
        overlap = (mask & ideal).sum(axis=(1, 2)) / (mask | ideal).sum(axis=(1, 2))
        overlaps[shape] = float(np.median(overlap))
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def _direction(times: np.ndarray, center_x: np.ndarray, center_y: np.ndarray) -> str | None:
    """Return the direction of the centre, from a line fitted to its positions; None if unclear."""
    slopes = np.polyfit(times, np.stack([center_x, center_y], axis=1), deg=1)[0]  # (2,)
    along = int(np.argmax(np.abs(slopes)))
    speed, drift = abs(slopes[along]), abs(slopes[1 - along])
    if speed < MIN_SPEED or drift > MAX_DRIFT * speed:
        return None
    step = [0, 0]
    step[along] = int(np.sign(slopes[along]))
    return next(name for name, value in DIRECTIONS.items() if list(value) == step)
