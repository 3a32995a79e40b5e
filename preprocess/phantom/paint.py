"""Paints the canvas of a procedural lesion (`appearance.py`); `camera.py` takes pictures of it.

Pure functions. RGB throughout. Broad structures are painted at half the canvas's resolution, fine ones only where the
lesion is, and one matrix combines the absorbers (`cv2.transform`): about 20 ms per lesion on one core.
"""

import cv2
import numpy as np

from preprocess.phantom.appearance import HEIGHT_PX, Lesion

SCALE = 0.8  # canvas pixels per picture pixel: dermatoscopes are about that soft
SIDE = 512  # the canvas, square
_HALF = SIDE // 2

_BROWN = (0.50, 0.93, 1.15)
_BLUE = (1.15, 0.85, 0.62)
_RED = (0.16, 1.02, 0.58)
_WHITE = np.array([240, 222, 220], np.float32)
_YELLOW = np.array([222, 180, 112], np.float32)
"""Absorption per unit amount in R, G, B, and the colours of what covers."""

Size = tuple[int, int]
Cover = tuple[np.ndarray, np.ndarray]


def _field(rng: np.random.Generator, bump_px: float, size: Size) -> np.ndarray:
    """Smooth noise with bumps of about `bump_px`: (height, width) float32, mean 0, standard deviation near 0.7."""
    rows, columns = (max(2, round(side / bump_px)) + 2 for side in size)
    return cv2.resize(rng.standard_normal((rows, columns), dtype=np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)


def _fractal(rng: np.random.Generator, bump_px: float, octaves: int, size: Size) -> np.ndarray:
    """Noise on `octaves` scales, each half the size and half the strength of the one before."""
    total = _field(rng, bump_px, size)
    for octave in range(1, octaves):
        total += _field(rng, bump_px / 2**octave, size) * np.float32(0.5**octave)
    return total


def smooth_step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Smooth step: 0 at and beyond `low`, 1 at and beyond `high` (which may be the smaller one)."""
    t = (values - np.float32(low)) * np.float32(1 / (high - low))
    np.clip(t, 0, 1, out=t)
    return t * t * (np.float32(3) - np.float32(2) * t)


def _cells(rng: np.random.Generator, spacing_px: float, keep: float, size: Size) -> np.ndarray:
    """Distance to the nearest seed of a jittered hexagonal lattice, in spacings: (height, width) float32.

    High along the borders of the cells, 0 at their centres (Worley's cellular noise). Thinned to `keep` of the seeds.
    """
    height, width = size
    rows, columns = int(height / (spacing_px * 0.87)) + 3, int(width / spacing_px) + 3
    y, x = np.mgrid[0:rows, 0:columns]
    points = np.stack([(x + 0.5 * (y % 2) - 1).ravel(), (y.ravel() - 1) * 0.87], 1) * spacing_px
    points += rng.normal(0, 0.2 * spacing_px, points.shape)
    points = points[rng.random(len(points)) < keep].round().astype(int)
    points = points[(points >= 0).all(1) & (points < (width, height)).all(1)]
    empty = np.full(size, 255, np.uint8)
    empty[points[:, 1], points[:, 0]] = 0
    if not len(points):
        return np.full(size, 2, np.float32)
    return cv2.distanceTransform(empty, cv2.DIST_L2, cv2.DIST_MASK_5) * np.float32(1 / spacing_px)


def draw_curve(paint: np.ndarray, path: np.ndarray, shade: int, width: int) -> None:
    """Draw a smooth line through (n, 2) points x, y, in place, to a sixteenth of a pixel."""
    cv2.polylines(paint, [(path * 16).round().astype(np.int32)], False, shade, width, cv2.LINE_AA, 4)


def _vessels(rng: np.random.Generator, radius_px: float, branches: int, size: Size) -> np.ndarray:
    """Arborising vessels about the middle: (height, width) float32, 0–1, thick trunks that branch into thin ones."""
    paint = np.zeros(size, np.uint8)
    middle = np.array(size[::-1]) / 2
    trunks = []
    for _ in range(branches):
        angle = rng.uniform(0, 2 * np.pi)
        start = middle + radius_px * np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.5, 1.05)
        heading, length = angle + np.pi + rng.normal(0, 0.7), radius_px * rng.uniform(0.5, 1.1)
        trunks.append((start, heading, rng.uniform(1.4, 2.9), length))
    while trunks:
        start, angle, width, length = trunks.pop()
        steps = max(4, int(length / 6))
        angles = angle + np.cumsum(rng.normal(0, 0.24, steps))
        path = start + np.cumsum(np.stack([np.cos(angles), np.sin(angles)], 1) * 6, 0)
        draw_curve(paint, path, 255, max(1, round(width)))
        if width > 1.1:
            for _ in range(int(rng.integers(2, 4))):
                at = int(rng.integers(steps // 3, steps))
                turn = rng.choice((-1, 1)) * rng.uniform(0.4, 1.1)
                trunks.append((path[at], angles[at] + turn, width * 0.6, length * rng.uniform(0.35, 0.65)))
    return cv2.GaussianBlur(paint, (0, 0), 0.8).astype(np.float32) * np.float32(1 / 255)


class _Shape:
    """Where a lesion is. `window` is its bounding box on the half canvas, and the fields are cut to it, float32.

    An ellipse in coordinates bent by noise, so that borders wander and lobes form. `inside` is 1 in the middle, 0 on
    the border and negative outside, in radii; `core` the same about an eccentric middle; `body` the opacity, 0–1.
    """

    def __init__(self, lesion: Lesion, radius_px: float, rng: np.random.Generator) -> None:
        look, half = lesion.look, (_HALF, _HALF)
        y, x = np.mgrid[0:_HALF, 0:_HALF].astype(np.float32)
        bend = np.float32(look.irregular * radius_px)
        x = x - _HALF / 2 + _fractal(rng, 1.5 * radius_px, 4, half) * bend
        y = y - _HALF / 2 + _fractal(rng, 1.5 * radius_px, 4, half) * bend
        angle, ratio = rng.uniform(0, np.pi), np.exp(look.elongation * rng.uniform(0.2, 1.0))
        cos, sin = np.cos(angle) / radius_px, np.sin(angle) / radius_px
        across = x * np.float32(cos / ratio) + y * np.float32(sin / ratio)
        along = y * np.float32(cos * ratio) - x * np.float32(sin * ratio)
        inside = np.float32(1) - cv2.magnitude(across, along)
        core = np.float32(1) - cv2.magnitude(across + np.float32(rng.normal(0, 0.2)), along)
        fade = np.exp(_field(rng, 1.5 * radius_px, half) * np.float32(0.6)) * np.float32(max(0.03, look.soft))
        body = smooth_step(inside / fade, -0.4, 0.8)
        left, top, width, height = cv2.boundingRect((body > 0).astype(np.uint8))
        self.window = (slice(top, top + height), slice(left, left + width))
        self.fine_window = (slice(2 * top, 2 * (top + height)), slice(2 * left, 2 * (left + width)))
        self.size, self.radius_px = (height, width), radius_px
        self.inside, self.core, self.body = inside[self.window], core[self.window], body[self.window]


def _broad(lesion: Lesion, shape: _Shape, rng: np.random.Generator) -> tuple[list[np.ndarray], list[Cover]]:
    """What is broad in a lesion, in its window: amounts of brown, blue and red; (opacity, colour) of what covers."""
    look, core, size = lesion.look, shape.core, shape.size

    def noise(bump_px: float, octaves: int = 1) -> np.ndarray:
        return _fractal(rng, bump_px, octaves, size)

    patches = noise(0.45 * max(shape.radius_px, 24), 4)
    brown = np.float32(look.brown_flat) * (1 + np.float32(0.25) * patches)
    brown += np.float32(look.brown_patch * 1.3) * smooth_step(patches, -0.3, 1.2)
    brown += np.float32(look.brown_core) * smooth_step(core, 0.0, 0.9)
    blue = np.zeros_like(brown)
    if look.blue_veil > 0.02:
        blue += np.float32(look.blue_veil) * smooth_step(noise(42, 3) + np.float32(0.8) * core, 0.3, 1.4)
    if look.blue_nests > 0.02:
        seeds = _cells(rng, rng.uniform(12, 21), 0.3, size) + np.float32(0.09) * noise(10, 2)
        nests = smooth_step(seeds, 0.38, 0.12) * smooth_step(noise(40), -0.3, 0.7) * np.float32(look.blue_nests)
        blue += nests
        brown += np.float32(0.3) * nests
    red = np.float32(look.red_flat) * (1 + np.float32(0.4) * noise(36, 3))
    covers: list[Cover] = []
    if look.red_mesh + look.yellow_follicles > 0.04:
        follicles = _cells(rng, rng.uniform(7, 11), 0.8, size) + np.float32(0.12) * noise(6, 2)
        uneven = smooth_step(noise(28), -0.9, 0.6)
        red += np.float32(look.red_mesh) * smooth_step(follicles, 0.2, 0.6) * uneven
        covers.append((np.float32(look.yellow_follicles) * smooth_step(follicles, 0.3, 0.05) * uneven, _YELLOW))
    if look.red_lacunae > 0.02:
        seeds = _cells(rng, rng.uniform(10, 18), 0.75, size) + np.float32(0.05) * noise(5)
        filled = smooth_step(seeds, 0.7, 0.35) * np.float32(look.red_lacunae)
        red += filled * (np.float32(0.8) + np.float32(0.3) * noise(21))
        blue += np.float32(0.25) * filled * smooth_step(noise(42), 0.2, 0.9)
    if look.white_scar > 0.02:
        covers.append(
            (np.float32(look.white_scar) * smooth_step(core + np.float32(0.25) * noise(28, 3), 0.3, 1.05), _WHITE)
        )
    if look.white_scale > 0.02:
        covers.append((np.float32(look.white_scale) * smooth_step(noise(14, 3), 0.4, 1.5), _WHITE))
    if look.white_milia > 0.02:
        milia = smooth_step(_cells(rng, rng.uniform(9, 14), 0.4, size), 0.22, 0.05)
        covers.append((np.float32(look.white_milia) * milia, _WHITE))
    if look.yellow_flat > 0.02:
        covers.append((np.full(size, 0.55 * look.yellow_flat, np.float32), _YELLOW))
    covers = [(np.clip(opacity * shape.body, 0, 0.85), colour) for opacity, colour in covers]
    return [np.maximum(amount, 0) * shape.body for amount in (brown, blue, red)], covers


def _fine(lesion: Lesion, shape: _Shape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What is fine in a lesion, in its window at full resolution: brown network and globules, red vessels."""
    look = lesion.look
    height, width = size = (2 * shape.size[0], 2 * shape.size[1])
    brown = np.zeros(size, np.float32)
    if look.brown_network + look.brown_rim > 0.02:
        rim = cv2.resize(smooth_step(shape.inside, 0.55, 0.15), (width, height))
        mesh = smooth_step(
            _cells(rng, rng.uniform(6.5, 10.5), 0.95, size) + np.float32(0.05) * _field(rng, 7, size), 0.25, 0.68
        )
        mesh *= np.float32(1) + np.float32(0.6) * _field(rng, 64, size)
        brown += mesh * (
            rim * np.float32(0.5 * look.brown_network + look.brown_rim) + np.float32(0.5 * look.brown_network)
        )
    if look.brown_globules > 0.02:
        dots = _cells(rng, rng.uniform(9.5, 16), 0.35, size) + np.float32(0.04) * _field(rng, 6, size)
        brown += (
            smooth_step(dots, 0.32, 0.12)
            * smooth_step(_field(rng, 73, size), -0.2, 0.7)
            * np.float32(1.1 * look.brown_globules)
        )
    red = np.zeros(size, np.float32)
    if look.red_vessels > 0.03:
        branches = 3 + int(5 * min(1.0, look.red_vessels))
        red += _vessels(rng, 2 * shape.radius_px, branches, size) * np.float32(1.3 * look.red_vessels)
    body = cv2.resize(shape.body, (width, height))
    return np.maximum(brown, 0) * body, red * body


def paint_lesion(lesion: Lesion) -> np.ndarray:
    """The canvas with the lesion in its middle: (512, 512, 3) float32, RGB 0–255, 0.8 pixels to one of a picture."""
    rng = np.random.Generator(np.random.Philox(lesion.texture_seed))
    half, full = (_HALF, _HALF), (SIDE, SIDE)

    # Bare skin: mottled, with freckles; then furrows, two crossing families of fine lines.
    red = _fractal(rng, 64, 3, half) * np.float32(0.03 + 0.02 * lesion.difficulty)
    red += _fractal(rng, 6, 2, half) * np.float32(rng.uniform(0.015, 0.05))
    brown = _fractal(rng, 36, 2, half) * np.float32(0.02)
    if lesion.freckles > 0:
        brown += smooth_step(_field(rng, 8, half), 0.6, 2.2) * np.float32(0.3 * lesion.freckles)
    blue = np.zeros(half, np.float32)
    furrows = np.zeros(full, np.float32)
    for grain in ((80, 240), (230, 85)):
        furrows += cv2.resize(rng.standard_normal(grain, dtype=np.float32), full)
    furrows *= np.float32(rng.uniform(0.008, 0.02))

    shape = _Shape(lesion, lesion.look.radius * HEIGHT_PX * SCALE / 2, rng)
    amounts, covers = _broad(lesion, shape, rng)
    for amount, more in zip((brown, blue, red), amounts, strict=True):
        amount[shape.window] += more
    brown, blue, red = (cv2.resize(amount, full) for amount in (brown, blue, red))
    brown += furrows
    fine_brown, fine_red = _fine(lesion, shape, rng)
    brown[shape.fine_window] += fine_brown
    red[shape.fine_window] += fine_red

    # Light that comes back: skin · exp(−Σ amount · absorption).
    matrix = np.column_stack([-np.array([_BROWN, _BLUE, _RED], np.float32).T, np.log(lesion.skin)])
    canvas = cv2.exp(cv2.transform(cv2.merge([brown, blue, red]), matrix.astype(np.float32)))
    _cover(canvas[shape.fine_window], covers)
    return canvas


def _cover(region: np.ndarray, covers: list[Cover]) -> None:
    """Lay each colour over a region of the canvas, in place. A cover is darker where the skin below is darker."""
    height, width = region.shape[:2]
    for opacity, colour in covers:
        opacity = cv2.resize(opacity, (width, height))
        light = opacity * (region[..., 1] * np.float32(0.4 / 170) + np.float32(0.6))
        keep = np.float32(1) - opacity
        for channel in range(3):
            region[..., channel] *= keep
            region[..., channel] += light * colour[channel]
