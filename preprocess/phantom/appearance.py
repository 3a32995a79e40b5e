"""What a procedural lesion looks like: the appearance of each class as numbers, and the draw of one lesion from them.

The colour model is optical density, as in skin optics: light that crosses the skin loses what melanin and blood absorb,
so a lesion is `skin · exp(−Σ amount · absorption)`. Brown is shallow melanin, blue-grey deep melanin, pink to magenta
blood. The amounts per class follow the textbook signs of dermoscopy (network, veil, arborising vessels, lacunae, …).
"""

from dataclasses import dataclass, fields, replace

import numpy as np

WIDTH_PX, HEIGHT_PX = 600, 450
"""Of a picture, as in HAM10000."""


@dataclass(frozen=True, slots=True)
class Look:
    """The appearance of a lesion. Lengths are fractions of the picture's height; the rest are amounts, 0 = absent.

    Prefixes name the absorber: `brown_` shallow melanin, `blue_` deep melanin, `red_` blood, `white_` and `yellow_`
    what covers the colour (scar, scale, keratin).
    """

    radius: float = 0.2  # mean radius
    spread: float = 0.3  # of log radius, standard deviation within the class
    elongation: float = 0.2
    irregular: float = 0.12  # roughness of the border
    soft: float = 0.12  # width of the fading at the border, in radii
    brown_flat: float = 0.0
    brown_patch: float = 0.0  # uneven in large patches
    brown_network: float = 0.0  # honeycomb of pigmented lines
    brown_rim: float = 0.0  # network at the edge only
    brown_globules: float = 0.0
    brown_core: float = 0.0  # darker towards the middle
    blue_veil: float = 0.0
    blue_nests: float = 0.0  # ovoid nests
    red_flat: float = 0.0
    red_mesh: float = 0.0  # red pseudo-network around follicles
    red_vessels: float = 0.0  # arborising vessels
    red_lacunae: float = 0.0
    white_scar: float = 0.0  # white centre
    white_scale: float = 0.0
    white_milia: float = 0.0  # bright dots
    yellow_flat: float = 0.0
    yellow_follicles: float = 0.0


LOOKS: dict[str, Look] = {
    "akiec": Look(0.25, 0.25, 0.25, 0.2, 0.7, brown_flat=0.1, brown_patch=0.2, red_flat=0.22, red_mesh=0.32,
                  red_vessels=0.15, white_scale=0.5, yellow_flat=0.12, yellow_follicles=0.3),
    "bcc": Look(0.21, 0.3, 0.25, 0.2, 0.6, brown_flat=0.06, brown_patch=0.15, blue_nests=0.8, red_flat=0.2,
                red_vessels=0.7, white_scar=0.25, white_scale=0.15),
    "bkl": Look(0.25, 0.3, 0.25, 0.12, 0.1, brown_flat=0.38, brown_patch=0.3, brown_globules=0.35, brown_network=0.15,
                blue_veil=0.12, white_milia=0.5, yellow_flat=0.4),
    "df": Look(0.17, 0.22, 0.12, 0.08, 0.7, brown_flat=0.2, brown_rim=0.4, red_flat=0.25, white_scar=0.6),
    "mel": Look(0.27, 0.28, 0.3, 0.2, 0.25, brown_flat=0.5, brown_patch=0.85, brown_network=0.4, brown_globules=0.6,
                blue_veil=0.75, red_flat=0.15, red_vessels=0.1, white_scar=0.22),
    "nv": Look(0.17, 0.38, 0.2, 0.08, 0.35, brown_flat=0.45, brown_patch=0.25, brown_network=0.55, brown_globules=0.15,
               brown_core=0.4, red_flat=0.12),
    "vasc": Look(0.16, 0.3, 0.2, 0.11, 0.12, blue_veil=0.12, red_flat=0.6, red_lacunae=0.75, white_scale=0.05),
}  # fmt: skip
"""One prototype a class. Lesions scatter about it, and difficulty pulls them towards the other classes."""

_CONFUSED = {
    "akiec": ("bcc", "bkl", "df"),
    "bcc": ("akiec", "mel", "nv"),
    "bkl": ("nv", "mel", "akiec"),
    "df": ("nv", "bcc", "akiec"),
    "mel": ("nv", "bkl", "bcc"),
    "nv": ("mel", "bkl", "df"),
    "vasc": ("bcc", "nv", "mel"),
}
"""The classes that a difficult lesion of each class resembles, roughly those that HAM10000 models mix up."""

_SKIN = np.array([[224, 178, 164], [216, 168, 176], [204, 166, 170], [228, 190, 178], [198, 158, 172]], np.float32)
"""Typical skin under a dermatoscope, RGB 0–255: warm, pink, greyish, fair, purplish."""


@dataclass(frozen=True, slots=True)
class Lesion:
    """One lesion, ready to be painted. `skin` is RGB 0–255; `texture_seed` decides every random field of it."""

    dx: str
    look: Look
    skin: np.ndarray
    hair: float  # expected number of hairs in a picture
    freckles: float
    difficulty: float
    texture_seed: int


def _blend(a: Look, b: Look, share: float) -> Look:
    """The look `share` of the way from `a` to `b`."""
    return replace(a, **{f.name: (1 - share) * getattr(a, f.name) + share * getattr(b, f.name) for f in fields(Look)})


def draw_lesion(rng: np.random.Generator, dx: str, difficulty: float) -> Lesion:
    """One lesion of class `dx`. `difficulty`: 0, classes far apart, to 1, most lesions lean towards another class."""
    others = _CONFUSED[dx]
    other = others[int(rng.choice(len(others), p=(0.5, 0.3, 0.2)))]
    look = _blend(LOOKS[dx], LOOKS[other], 0.62 * difficulty * float(rng.beta(1.6, 1.3)))
    scatter = 0.12 + 0.35 * difficulty
    amounts = {}
    for field in fields(Look):
        value = getattr(look, field.name)
        noise = float(rng.standard_normal())
        if field.name == "radius":
            amounts["radius"] = float(np.clip(value * np.exp(look.spread * noise), 0.07, 0.42))
        elif field.name != "spread":
            amounts[field.name] = value * float(np.exp(np.clip(scatter * noise, -1.5, 1.0)))
    # A typical sign of the class may be missing: textbooks call these the exceptions.
    for name in (
        "brown_network",
        "brown_globules",
        "blue_nests",
        "red_vessels",
        "white_milia",
        "red_lacunae",
        "white_scar",
    ):
        if rng.random() < 0.1 + 0.25 * difficulty:
            amounts[name] *= 0.15
    skin = _SKIN[int(rng.integers(len(_SKIN)))] + rng.normal(0, 6, 3)
    skin = skin * np.float32(rng.normal(1.0, 0.03))
    hairy = rng.random()
    return Lesion(
        dx=dx,
        look=replace(look, **amounts),
        skin=np.clip(skin, 120, 245).astype(np.float32),
        hair=0.0 if hairy < 0.55 - 0.25 * difficulty else float(rng.exponential(9)),
        freckles=float(max(0.0, rng.normal(-0.4, 0.6) + 0.4 * difficulty)),
        difficulty=difficulty,
        texture_seed=int(rng.integers(1 << 62)),
    )
