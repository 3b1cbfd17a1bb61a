"""What surrounds the nodule of a phantom: lung with vessels, chest wall, and the scanner's noise and blur.

Lengths are in units of 1/128 of the patch's side, grey levels in 0-255 above the lung, as in phantoms.py.
"""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128.0      # units across a patch
OVERSAMPLING = 4  # canvas pixels per image pixel along a side: anti-aliasing of vessels and chest wall
TURN = np.linspace(0, 2 * np.pi, 64, endpoint=False)


def draw_background(rng: np.random.Generator, nodule: Any, size: int) -> np.ndarray:
    """Vessels, and in most cases a chest wall or mediastinum, as grey levels above the lung, float32 [size, size]."""
    scale = OVERSAMPLING * size / SIDE
    canvas = Image.new("L", (OVERSAMPLING * size,) * 2)
    draw = ImageDraw.Draw(canvas)

    def polygon(points, level):
        """points: complex, units from the patch's centre."""
        points = (points + SIDE / 2 * (1 + 1j)) * scale
        draw.polygon(points.view(np.float64).tolist(), fill=int(level))  # x0, y0, x1, y1, ...

    centre = complex(*nodule.centre)
    hilum = rng.uniform(75, 120) * np.exp(1j * rng.uniform(0, 2 * np.pi))
    # A few long vessels lie in the slice, fanning out from the hilum; most cross it and show as dots and streaks.
    start, heading = _fan(rng, rng.integers(20, 40), hilum)
    along = (rng.gamma(1.5, 1.5, len(start)) + 0.5) * heading
    across = (0.4 + rng.gamma(1.5, 0.3, len(start))) * 1j * heading
    streaks = start[:, None] + np.stack([-along, across, along, -across], -1)  # [count, 4], lozenges
    for streak in streaks[(np.abs(streaks - centre) > nodule.extent + 3).all(1)]:
        polygon(streak, rng.uniform(60, 180))
    for start, heading in zip(*_fan(rng, rng.integers(2, 6), hilum)):
        _vessel(rng, polygon, start, np.angle(heading), rng.uniform(1.0, 2.0), rng.uniform(25, 60),
                rng.uniform(40, 130), centre, nodule.extent + 3)
    if nodule.features["vessel_ratio"]:
        neck = centre + (nodule.vessel_end * nodule.radius - 0.5) * np.exp(1j * nodule.vessel_angle)
        level = nodule.features["vessel_ratio"] * nodule.features["core_contrast"]
        _vessel(rng, polygon, neck, nodule.vessel_angle, nodule.vessel_neck, rng.uniform(30, 70), level, centre, 0)

    border = rng.random()
    side = np.exp(1j * rng.uniform(0, 2 * np.pi))  # direction of the border seen from the centre
    distance, level = rng.uniform(33, 56), rng.uniform(70, 115)
    if border < 0.5:
        _chest_wall(rng, polygon, side, distance, level)
    elif border < 0.7:
        radius = rng.uniform(25, 60)
        wobble = 1 + 0.04 * np.cos(np.arange(2, 5)[:, None] * TURN + rng.uniform(0, 6, (3, 1))).sum(0)
        polygon((distance + 1.12 * radius) * side + radius * wobble * np.exp(1j * TURN), 1.2 * level)
    return np.asarray(canvas.reduce(OVERSAMPLING), np.float32)


def _fan(rng, count, hilum):
    """Random places in the patch and unit headings that point roughly away from the hilum, complex [count] each."""
    places = rng.uniform(-SIDE / 2, SIDE / 2, (count, 2)) @ (1, 1j)
    return places, np.exp(1j * (np.angle(places - hilum) + rng.normal(0, 0.5, count)))


def _vessel(rng, polygon, start, angle, half_width, length, level, keep_out, keep_out_radius):
    """Draw a tapering, winding vessel that may fork; it stops short of the disc that the nodule occupies."""
    steps = max(2, math.ceil(length / 4))
    headings = np.exp(1j * (angle + rng.normal(0, 0.16, steps).cumsum()))
    path = start + length / steps * np.concatenate([[0], headings.cumsum()])
    blocked = np.abs(path - keep_out) < keep_out_radius
    if blocked.any():
        path = path[:blocked.argmax()]
        if len(path) < 2:
            return
    width = half_width * (1 - 0.7 * np.arange(len(path)) / len(path))
    normal = 1j * np.append(headings[0], headings[:len(path) - 1]) * width
    polygon(np.concatenate([path + normal, (path - normal)[::-1]]), level)
    turn = 1
    for fork in range(2, len(path), 3):
        if width[fork] < 0.45:
            return
        turn = -turn  # branches leave on alternating sides
        _vessel(rng, polygon, path[fork], np.angle(headings[fork - 1]) + turn * rng.uniform(0.4, 1.0),
                rng.uniform(0.55, 0.85) * width[fork], rng.uniform(0.3, 0.6) * length, level,
                keep_out, keep_out_radius)


def _chest_wall(rng, polygon, side, distance, level):
    """Draw everything outside a large circle around the lung: soft tissue with a fat layer, and ribs in it."""
    radius = rng.uniform(70, 140)
    centre = (distance - radius) * side
    angles = np.linspace(0, 2 * np.pi, 128)
    sweep = -side * np.exp(1j * angles)  # the ring's seam lies opposite the wall, outside the patch
    wobble = 0.8 * np.cos(9 * angles + rng.uniform(0, 6))
    depth = rng.uniform(14, 24)
    for inner, brightness in ((0, level), (depth, rng.uniform(0.75, 0.95) * level),
                              (depth + rng.uniform(6, 12), rng.uniform(0.9, 1.1) * level)):
        edge = centre + (radius + inner + wobble) * sweep
        polygon(np.concatenate([edge, (centre + 400 * sweep)[::-1]]), brightness)
    place = rng.uniform(-0.3, 0.3)
    for _ in range(rng.integers(1, 4)):
        tangent = 1j * side * np.exp(1j * place)
        middle = centre - 1j * tangent * (radius + rng.uniform(6, 9))
        long, short = rng.uniform(8, 15), rng.uniform(3, 4.5)
        for shrink, brightness in ((0, rng.uniform(1.6, 2.1)), (1.3, rng.uniform(1.0, 1.3))):
            ring = (long - shrink) * np.cos(TURN) + 1j * (short - shrink) * np.sin(TURN)
            polygon(middle + tangent * ring, min(brightness * level, 225))
        place += rng.choice((-1, 1)) * rng.uniform(35, 55) / radius


def draw_textures(rng: np.random.Generator, size: int) -> np.ndarray:
    """Parenchyma and reconstruction noise, float32 [2, size, size], zero mean, unit variance."""
    spectrum = rng.standard_normal((2, size, size // 2 + 1, 2), np.float32).view(np.complex64)[..., 0]  # of white noise
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))  # cycles per pixel
    per_unit = frequency * size / SIDE  # anatomy has its scale in units, the scanner in pixels
    filters = np.stack([(1 + (14 * per_unit) ** 2) ** -0.75,
                        (frequency + 0.05) * np.exp(-((frequency / 0.28) ** 2))]).astype(np.float32)
    fields = np.fft.irfft2(spectrum * filters, s=(size, size))
    fields -= fields.mean((1, 2), keepdims=True)
    return fields / fields.std((1, 2), keepdims=True)


def blur(image: np.ndarray) -> np.ndarray:
    """Binomial point spread of 1-2-1 pixels along both axes; image [H, W]."""
    for _ in range(2):
        padded = np.pad(image, ((1, 1), (0, 0)), mode="edge")
        image = (0.25 * (padded[:-2] + padded[2:]) + 0.5 * padded[1:-1]).T
    return image
