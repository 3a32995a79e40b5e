"""Paints a procedural lesion (`preprocess.phantom`) and photographs it: one canvas a lesion, one picture a view.

Everything is OpenCV and float32 arrays, and a function of its arguments alone. RGB throughout.
"""

import cv2
import numpy as np

from preprocess.phantom import Lesion

WIDTH_PX, HEIGHT_PX = 600, 450
_SIDE = 640  # the canvas of a lesion, square, in pixels of the picture
_HALF = _SIDE // 2  # what is broad is painted at half that

_BROWN = np.array([0.50, 0.93, 1.15], np.float32)
_BLUE = np.array([1.15, 0.85, 0.62], np.float32)
_RED = np.array([0.16, 1.02, 0.58], np.float32)
_WHITE = np.array([240, 222, 220], np.float32)
_YELLOW = np.array([222, 180, 112], np.float32)
"""Absorption per unit amount in R, G, B, and the colours of what covers."""


def _field(rng: np.random.Generator, cells: int, side: int = _SIDE) -> np.ndarray:
    """Smooth noise with about `cells` bumps across: (side, side) float32, mean 0, standard deviation near 0.7."""
    coarse = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def _fractal(rng: np.random.Generator, cells: int, octaves: int, side: int = _SIDE) -> np.ndarray:
    """Noise on `octaves` scales, each half the size and half the strength of the one before."""
    total = _field(rng, cells, side)
    for octave in range(1, octaves):
        total += _field(rng, cells << octave, side) * np.float32(0.5**octave)
    return total


def _step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Smooth step: 0 at and beyond `low`, 1 at and beyond `high` (which may be the smaller one)."""
    t = (values - np.float32(low)) * np.float32(1 / (high - low))
    np.clip(t, 0, 1, out=t)
    return t * t * (np.float32(3) - np.float32(2) * t)


def _cells(rng: np.random.Generator, spacing_px: float, keep: float, side: int = _SIDE) -> np.ndarray:
    """Distance to the nearest seed of a jittered hexagonal lattice, in spacings: (side, side) float32.

    High along the borders of the cells, 0 at their centres (Worley's cellular noise). Thinned to `keep` of the seeds.
    """
    rows, columns = int(side / (spacing_px * 0.87)) + 3, int(side / spacing_px) + 3
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    x += 0.5 * (y % 2) - 1
    points = np.stack([x.ravel() * spacing_px, (y.ravel() - 1) * spacing_px * 0.87], 1)
    points += rng.normal(0, 0.2 * spacing_px, points.shape)
    points = points[rng.random(len(points)) < keep].round().astype(int)
    points = points[((points >= 0) & (points < side)).all(1)]
    empty = np.full((side, side), 255, np.uint8)
    empty[points[:, 1], points[:, 0]] = 0
    return cv2.distanceTransform(empty, cv2.DIST_L2, cv2.DIST_MASK_5) * np.float32(1 / spacing_px)


def _vessels(rng: np.random.Generator, radius_px: float, branches: int) -> np.ndarray:
    """Arborising vessels about the middle: (side, side) float32, 0–1, thick trunks that branch into thin ones."""
    paint = np.zeros((_SIDE, _SIDE), np.uint8)
    middle = _SIDE / 2
    trunks = []
    for _ in range(branches):
        angle = rng.uniform(0, 2 * np.pi)
        start = middle + radius_px * np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.5, 1.05)
        trunks.append(
            (start, angle + np.pi + rng.normal(0, 0.7), rng.uniform(1.6, 3.4), radius_px * rng.uniform(0.5, 1.1))
        )
    while trunks:
        start, angle, width, length = trunks.pop()
        steps = max(4, int(length / 7))
        angles = angle + np.cumsum(rng.normal(0, 0.24, steps))
        path = start + np.cumsum(np.stack([np.cos(angles), np.sin(angles)], 1) * 7, 0)
        cv2.polylines(paint, [(path * 16).round().astype(np.int32)], False, 255, max(1, round(width)), cv2.LINE_AA, 4)
        if width > 1.2:
            for _ in range(int(rng.integers(2, 4))):
                at = int(rng.integers(steps // 3, steps))
                turn = rng.choice((-1, 1)) * rng.uniform(0.4, 1.1)
                trunks.append((path[at], angles[at] + turn, width * 0.6, length * rng.uniform(0.35, 0.65)))
    return cv2.GaussianBlur(paint, (0, 0), 0.9).astype(np.float32) * np.float32(1 / 255)


def _skin(lesion: Lesion, rng: np.random.Generator) -> np.ndarray:
    """Bare skin as optical density: mottled, with furrows, pores and freckles; (side, side, 3) float32."""
    redness = _fractal(rng, 4, 3, _HALF) * np.float32(0.03 + 0.02 * lesion.difficulty)
    redness += _fractal(rng, 40, 2, _HALF) * np.float32(rng.uniform(0.015, 0.05))
    tan = _fractal(rng, 7, 2, _HALF) * np.float32(0.02)
    if lesion.freckles > 0:
        tan += _step(_field(rng, 30, _HALF), 0.6, 2.2) * np.float32(0.3 * lesion.freckles)
    density = _soak(redness, _RED)
    density += _soak(tan, _BROWN)
    density = cv2.resize(density, (_SIDE, _SIDE))
    # Furrows: two crossing families of fine lines; and pores between them.
    fine = np.zeros((_SIDE, _SIDE), np.float32)
    for rows, columns in ((90, 300), (280, 100)):
        lines = rng.standard_normal((rows, columns), dtype=np.float32)
        fine += cv2.resize(lines, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
    density += _soak(fine, _BROWN * np.float32(rng.uniform(0.008, 0.02)))
    return density


def _soak(amount: np.ndarray, absorption: np.ndarray) -> np.ndarray:
    """Optical density of an amount of one absorber: (h, w) → (h, w, 3)."""
    return cv2.merge([amount * absorption[0], amount * absorption[1], amount * absorption[2]])


class _Shape:
    """Where a lesion is, at half the canvas's resolution: (320, 320) float32 fields.

    An ellipse in coordinates bent by noise, so that borders wander and lobes form. `inside` is 1 in the middle, 0 on
    the border and negative outside, in radii; `core` the same about an eccentric middle; `body` the opacity, 0–1.
    """

    def __init__(self, lesion: Lesion, radius_px: float, rng: np.random.Generator) -> None:
        look = lesion.look
        waves = max(3, round(_SIDE / (1.5 * radius_px)))
        y, x = np.mgrid[0:_HALF, 0:_HALF].astype(np.float32)
        bend = np.float32(look.irregular * radius_px)
        x = x * 2 - _HALF + _fractal(rng, waves, 4, _HALF) * bend
        y = y * 2 - _HALF + _fractal(rng, waves, 4, _HALF) * bend
        angle, ratio = rng.uniform(0, np.pi), np.exp(look.elongation * rng.uniform(0.2, 1.0))
        across = x * np.float32(np.cos(angle) / radius_px / ratio) + y * np.float32(np.sin(angle) / radius_px / ratio)
        along = y * np.float32(np.cos(angle) / radius_px * ratio) - x * np.float32(np.sin(angle) / radius_px * ratio)
        self.inside = np.float32(1) - cv2.magnitude(across, along)
        self.core = np.float32(1) - cv2.magnitude(across + np.float32(rng.normal(0, 0.2)), along)
        fade = np.exp(_field(rng, waves, _HALF) * np.float32(0.6)) * np.float32(max(0.03, look.soft))
        self.body = _step(self.inside / fade, -0.4, 0.8)


def _colour(lesion: Lesion, shape: _Shape, radius_px: float, rng: np.random.Generator) -> tuple[np.ndarray, list]:
    """What is broad in a lesion: its optical density (320, 320, 3), and [(opacity, colour)] of what covers it."""
    look, core, body = lesion.look, shape.core, shape.body
    patches = _fractal(rng, max(4, round(900 / max(radius_px, 60))), 4, _HALF)
    brown = np.float32(look.brown_flat) * (1 + np.float32(0.25) * patches)
    brown += np.float32(look.brown_patch * 1.3) * _step(patches, -0.3, 1.2)
    brown += np.float32(look.brown_core) * _step(core, 0.0, 0.9)
    blue = np.zeros_like(brown)
    if look.blue_veil > 0.02:
        blue += np.float32(look.blue_veil) * _step(_fractal(rng, 6, 3, _HALF) + np.float32(0.8) * core, 0.3, 1.4)
    if look.blue_nests > 0.02:
        seeds = _cells(rng, rng.uniform(15, 26), 0.3, _HALF) + np.float32(0.09) * _fractal(rng, 24, 2, _HALF)
        nests = _step(seeds, 0.38, 0.12) * _step(_field(rng, 6, _HALF), -0.3, 0.7) * np.float32(look.blue_nests)
        blue += nests
        brown += np.float32(0.3) * nests
    red = np.float32(look.red_flat) * (1 + np.float32(0.4) * _fractal(rng, 7, 3, _HALF))
    covers = []
    if look.red_mesh + look.yellow_follicles > 0.04:
        follicles = _cells(rng, rng.uniform(9, 14), 0.8, _HALF) + np.float32(0.12) * _fractal(rng, 40, 2, _HALF)
        uneven = _step(_field(rng, 9, _HALF), -0.9, 0.6)
        red += np.float32(look.red_mesh) * _step(follicles, 0.2, 0.6) * uneven
        covers.append((np.float32(look.yellow_follicles) * _step(follicles, 0.3, 0.05) * uneven, _YELLOW))
    if look.red_lacunae > 0.02:
        cells = _cells(rng, rng.uniform(13, 22), 0.75, _HALF) + np.float32(0.05) * _field(rng, 50, _HALF)
        filled = _step(cells, 0.7, 0.35) * np.float32(look.red_lacunae)
        red += filled * (np.float32(0.8) + np.float32(0.3) * _field(rng, 12, _HALF))
        blue += np.float32(0.25) * filled * _step(_field(rng, 6, _HALF), 0.2, 0.9)
    density = np.zeros((_HALF, _HALF, 3), np.float32)
    for amount, absorption in ((brown, _BROWN), (blue, _BLUE), (red, _RED)):
        density += _soak(np.maximum(amount, 0) * body, absorption)

    if look.white_scar > 0.02:
        scar = core + np.float32(0.25) * _fractal(rng, 9, 3, _HALF)
        covers.append((np.float32(look.white_scar) * _step(scar, 0.3, 1.05), _WHITE))
    if look.white_scale > 0.02:
        covers.append((np.float32(look.white_scale) * _step(_fractal(rng, 18, 3, _HALF), 0.4, 1.5), _WHITE))
    if look.white_milia > 0.02:
        milia = _step(_cells(rng, rng.uniform(11, 18), 0.4, _HALF), 0.2, 0.05)
        covers.append((np.float32(look.white_milia) * milia, _WHITE))
    if look.yellow_flat > 0.02:
        covers.append((np.float32(0.55 * look.yellow_flat) * np.ones_like(body), _YELLOW))
    for opacity, _ in covers:
        opacity *= body
        np.clip(opacity, 0, 0.85, out=opacity)
    return density, covers


def _detail(lesion: Lesion, shape: _Shape, radius_px: float, rng: np.random.Generator) -> np.ndarray:
    """What is fine in a lesion, at full resolution: network, globules, vessels as density (640, 640, 3)."""
    look = lesion.look
    body = cv2.resize(shape.body, (_SIDE, _SIDE))
    brown = np.zeros((_SIDE, _SIDE), np.float32)
    if look.brown_network + look.brown_rim > 0.02:
        rim = cv2.resize(_step(shape.inside, 0.55, 0.15), (_SIDE, _SIDE))
        mesh = _step(_cells(rng, rng.uniform(8, 13), 0.95) + np.float32(0.05) * _field(rng, 70), 0.25, 0.68)
        mesh *= 1 + np.float32(0.6) * _field(rng, 8)
        brown += mesh * (
            rim * np.float32(0.5 * look.brown_network + look.brown_rim) + np.float32(0.5 * look.brown_network)
        )
    if look.brown_globules > 0.02:
        dots = _cells(rng, rng.uniform(12, 20), 0.35) + np.float32(0.04) * _field(rng, 80)
        brown += _step(dots, 0.3, 0.12) * _step(_field(rng, 7), -0.2, 0.7) * np.float32(look.brown_globules * 1.1)
    density = _soak(np.maximum(brown, 0) * body, _BROWN)
    if look.red_vessels > 0.03:
        vessels = _vessels(rng, radius_px, 3 + int(5 * min(1.0, look.red_vessels)))
        density += _soak(vessels * body * np.float32(look.red_vessels * 1.3), _RED)
    return density


def paint_lesion(lesion: Lesion) -> np.ndarray:
    """The canvas of a lesion, centred on it: (640, 640, 3) float32, RGB 0–255. Its pixels are those of a picture."""
    rng = np.random.Generator(np.random.Philox(lesion.texture_seed))
    radius_px = lesion.look.radius * HEIGHT_PX
    density = _skin(lesion, rng)
    shape = _Shape(lesion, radius_px, rng)
    broad, covers = _colour(lesion, shape, radius_px, rng)
    density += cv2.resize(broad, (_SIDE, _SIDE))
    density += _detail(lesion, shape, radius_px, rng)
    canvas = np.exp(-density, out=density)
    canvas *= lesion.skin
    _cover(canvas, covers)
    return canvas


def _cover(canvas: np.ndarray, covers: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Lay each colour over the canvas with its opacity, in place; what covers is as light as what it covers allows."""
    if not covers:
        return
    paint = np.zeros((_HALF, _HALF, 3), np.float32)
    through = np.ones((_HALF, _HALF), np.float32)
    for opacity, colour in covers:
        paint *= (1 - opacity)[..., None]
        paint += _soak(opacity, colour)
        through *= 1 - opacity
    light = cv2.resize(canvas[..., 1], (_HALF, _HALF), interpolation=cv2.INTER_AREA)
    paint *= (light * np.float32(0.4 / 170) + np.float32(0.6))[..., None]
    canvas *= cv2.resize(through, (_SIDE, _SIDE))[..., None]
    canvas += cv2.resize(paint, (_SIDE, _SIDE))


def _hairs(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Hairs across a picture: (450, 600, 1) float32 opacity 0–1, and their colour RGB."""
    paint = np.zeros((HEIGHT_PX, WIDTH_PX), np.uint8)
    t = np.linspace(0, 1, 24)[:, None]
    main = rng.uniform(0, np.pi)
    stubble = rng.random() < 0.25
    for _ in range(number):
        angle = main + rng.normal(0, 0.45)
        length = rng.uniform(15, 45) if stubble else rng.uniform(90, 420)
        a = rng.uniform((0, 0), (WIDTH_PX, HEIGHT_PX))
        direction = np.array([np.cos(angle), np.sin(angle)])
        bow = np.array([-direction[1], direction[0]]) * length * rng.normal(0, 0.2)
        path = (1 - t) ** 2 * a + 2 * t * (1 - t) * (a + direction * length / 2 + bow) + t**2 * (a + direction * length)
        width = int(rng.choice((1, 2, 3), p=(0.45, 0.4, 0.15)))
        shade = int(rng.uniform(130, 245))
        cv2.polylines(paint, [(path * 16).round().astype(np.int32)], False, shade, width, cv2.LINE_AA, 4)
    opacity = cv2.GaussianBlur(paint, (0, 0), 0.7).astype(np.float32)[..., None] * np.float32(1 / 255)
    return opacity, np.array([52, 36, 34], np.float32) * np.float32(rng.uniform(0.5, 1.6))


def _marks(picture: np.ndarray, rng: np.random.Generator) -> None:
    """What the instrument adds, in place: a millimetre scale, gel bubbles, glints; each on some pictures only."""
    if rng.random() < 0.12:
        spacing, start = rng.uniform(16, 26), rng.uniform(0, 200)
        height = HEIGHT_PX - rng.uniform(20, 50)
        for tick in range(int(rng.integers(8, 16))):
            at = start + tick * spacing
            ends = np.array([[at, height], [at, height - (16 if tick % 5 == 0 else 9)]])
            cv2.polylines(picture, [(ends * 16).round().astype(np.int32)], False, (40, 36, 44), 1, cv2.LINE_AA, 4)
    if rng.random() < 0.18:
        for _ in range(int(rng.integers(2, 14))):
            at = tuple(int(v) for v in rng.uniform((0, 0), (WIDTH_PX * 16, HEIGHT_PX * 16)))
            size = float(rng.uniform(3, 11))
            patch = np.zeros((HEIGHT_PX, WIDTH_PX), np.uint8)
            cv2.circle(patch, at, int(size * 16), 70, 1, cv2.LINE_AA, 4)
            cv2.circle(patch, (at[0] - int(size * 5), at[1] - int(size * 5)), 20, 200, -1, cv2.LINE_AA, 4)
            picture += patch[..., None].astype(np.float32) * np.float32(0.6)


def _light(rng: np.random.Generator) -> np.ndarray:
    """The light of one picture: (450, 600, 1) float32 factor; uneven, darker in the corners, at times a round field."""
    y, x = np.mgrid[0:HEIGHT_PX, 0:WIDTH_PX].astype(np.float32)
    cx, cy = WIDTH_PX / 2 + rng.normal(0, 22), HEIGHT_PX / 2 + rng.normal(0, 18)
    away = np.hypot(x - np.float32(cx), y - np.float32(cy)).astype(np.float32)
    light = np.float32(1) - np.float32(rng.uniform(0.04, 0.3)) * (away * np.float32(1 / 375)) ** 3
    light += (x - np.float32(WIDTH_PX / 2)) * np.float32(rng.normal(0, 0.00012))
    if rng.random() < 0.2:
        field = rng.uniform(275, 350)
        light *= np.float32(0.06) + np.float32(0.94) * _step(away, field + rng.uniform(6, 40), field)
    return np.maximum(light, 0)[..., None]


def photograph(lesion: Lesion, canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One view of a lesion: its canvas shifted, turned, flipped, zoomed and lit anew; (450, 600, 3) uint8 RGB."""
    angle, zoom = rng.uniform(0, 2 * np.pi), float(np.exp(rng.normal(0, 0.12)))
    flip = 1 if rng.random() < 0.5 else -1
    shift = np.clip(rng.normal(0, 1, 2), -2, 2) * (34, 24)
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    matrix = np.array([[cos * flip, -sin, 0], [sin * flip, cos, 0]])
    matrix[:, 2] = np.array([WIDTH_PX, HEIGHT_PX]) / 2 + shift - matrix[:, :2] @ (_SIDE / 2, _SIDE / 2)
    picture = cv2.warpAffine(
        canvas, matrix, (WIDTH_PX, HEIGHT_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.5, 1.2)))
    number = int(rng.poisson(lesion.hair)) if lesion.hair else 0
    if number:
        opacity, colour = _hairs(rng, number)
        picture += opacity * (colour - picture)
    _marks(picture, rng)
    # White balance drifts between orange and purple, hardly towards green; exposure drifts too.
    warm, pink = rng.normal(0, 0.02 + 0.05 * lesion.difficulty, 2)
    camera = np.array([1 + 0.5 * warm, 1 - 0.3 * pink, 1 - warm + 0.3 * pink], np.float32)
    picture *= _light(rng) * camera * np.float32(np.exp(rng.normal(0, 0.03 + 0.05 * lesion.difficulty)))
    noise = rng.standard_normal((HEIGHT_PX, WIDTH_PX), dtype=np.float32)
    picture += (noise * np.float32(rng.uniform(2.0, 5.0)))[..., None]
    return np.clip(picture, 0, 255).astype(np.uint8)
