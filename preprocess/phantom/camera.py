"""Photographs a painted lesion: pose, light, hairs, marks on the glass, white balance, sensor noise.

One canvas gives any number of views, each a function of the lesion and a random stream. RGB throughout.
"""

import cv2
import numpy as np

from preprocess.phantom.appearance import HEIGHT_PX, WIDTH_PX, Lesion
from preprocess.phantom.paint import SCALE, SIDE, draw_curve, smooth_step


def _hairs(rng: np.random.Generator, number: int) -> np.ndarray:
    """Hairs across a picture: (450, 600) float32, the share of light that they let through."""
    paint = np.zeros((HEIGHT_PX, WIDTH_PX), np.uint8)
    t = np.linspace(0, 1, 24)[:, None]
    main, stubble, darkness = rng.uniform(0, np.pi), rng.random() < 0.25, rng.uniform(0.6, 1.0)
    for _ in range(number):
        angle = main + rng.normal(0, 0.45)
        length = rng.uniform(15, 45) if stubble else rng.uniform(90, 420)
        start = rng.uniform((0, 0), (WIDTH_PX, HEIGHT_PX))
        along = np.array([np.cos(angle), np.sin(angle)]) * length
        bow = np.array([-along[1], along[0]]) * rng.normal(0, 0.2)
        path = start + 2 * t * (1 - t) * (along / 2 + bow) + t**2 * along  # a quadratic Bézier curve
        draw_curve(paint, path, int(darkness * rng.uniform(130, 235)), int(rng.choice((1, 2, 3), p=(0.45, 0.4, 0.15))))
    blurred = cv2.GaussianBlur(paint, (0, 0), 0.7)
    return np.float32(1) - blurred.astype(np.float32) * np.float32(1 / 255)


def _light(rng: np.random.Generator) -> np.ndarray:
    """The light of one picture: (450, 600) float32 factor; uneven, darker in the corners, at times a round field."""
    y, x = np.mgrid[0 : HEIGHT_PX // 2, 0 : WIDTH_PX // 2].astype(np.float32)
    x, y = 2 * x - np.float32(WIDTH_PX / 2), 2 * y - np.float32(HEIGHT_PX / 2)
    away = cv2.magnitude(x - np.float32(rng.normal(0, 22)), y - np.float32(rng.normal(0, 18)))
    corner = away * np.float32(1 / 375)
    light = np.float32(1) - np.float32(rng.uniform(0.04, 0.3)) * corner * corner * corner
    light += x * np.float32(rng.normal(0, 0.00012))
    if rng.random() < 0.2:
        field_px = rng.uniform(275, 350)
        light *= np.float32(0.06) + np.float32(0.94) * smooth_step(away, field_px + rng.uniform(6, 40), field_px)
    return cv2.resize(np.maximum(light, 0), (WIDTH_PX, HEIGHT_PX))


def _marks(rng: np.random.Generator, light: np.ndarray) -> None:
    """Draw marks on the glass into the light, in place: a millimetre scale, gel bubbles; each in some pictures only."""
    if rng.random() < 0.12:
        spacing, start, foot = rng.uniform(16, 26), rng.uniform(0, 200), HEIGHT_PX - rng.uniform(20, 50)
        for tick in range(int(rng.integers(8, 16))):
            at = start + tick * spacing
            cv2.line(light, (int(at), int(foot)), (int(at), int(foot - (16 if tick % 5 == 0 else 9))), 0.25, 1)
    if rng.random() < 0.18:
        for _ in range(int(rng.integers(2, 14))):
            x, y, radius_px = int(rng.integers(WIDTH_PX)), int(rng.integers(HEIGHT_PX)), int(rng.integers(3, 12))
            cv2.circle(light, (x, y), radius_px, 1.25, 1)
            cv2.circle(light, (x - radius_px // 3, y - radius_px // 3), 1, 1.9, -1)


def photograph(lesion: Lesion, canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One view of a lesion: its canvas shifted, turned, flipped, zoomed, in new light; (450, 600, 3) uint8 RGB."""
    angle, zoom = rng.uniform(0, 2 * np.pi), float(np.exp(rng.normal(0, 0.12))) / SCALE
    flip = 1 if rng.random() < 0.5 else -1
    shift = np.clip(rng.normal(0, 1, 2), -2, 2) * (34, 24)
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    turn = np.array([[cos * flip, -sin], [sin * flip, cos]])
    move = np.array([WIDTH_PX, HEIGHT_PX]) / 2 + shift - turn @ np.full(2, SIDE / 2)
    matrix, size = np.column_stack([turn, move]), (WIDTH_PX, HEIGHT_PX)
    picture = cv2.warpAffine(canvas, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.5, 1.2)))
    light = _light(rng)
    number = int(rng.poisson(lesion.hair)) if lesion.hair else 0
    if number:
        light *= _hairs(rng, number)
    _marks(rng, light)
    # White balance drifts between orange and purple, hardly towards green; exposure drifts too.
    warm, pink = rng.normal(0, 0.02 + 0.05 * lesion.difficulty, 2)
    light *= np.float32(np.exp(rng.normal(0, 0.03 + 0.05 * lesion.difficulty)))
    camera = (1 + 0.5 * warm, 1 - 0.3 * pink, 1 - warm + 0.3 * pink)
    picture = cv2.multiply(picture, cv2.merge([light * np.float32(gain) for gain in camera]))
    # Sensor noise: the sum of two uniform bytes is near enough to normal, and a tenth of its cost.
    grains = rng.integers(0, 256, (2, HEIGHT_PX, WIDTH_PX), dtype=np.uint8).astype(np.float32).sum(0)
    noise = (grains - np.float32(255)) * np.float32(rng.uniform(2.0, 5.0) / 104)
    return cv2.add(picture, cv2.merge([noise] * 3), dtype=cv2.CV_8U)  # rounds and saturates
