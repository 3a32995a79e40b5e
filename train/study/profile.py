"""Least squares of `y = a − b·n^−c` for many data sets at once: for each c of a grid the rest is a straight line.

What a fit leaves (`rss`) as a function of one quantity, everything else free, is its profile. Values whose profile
stays under a limit form an interval that follows the bend of the problem (Bates & Watts 1988, "Nonlinear regression
analysis and its applications", section 6.1), where an ellipse around the best fit, or percentiles of refits, would not.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

C_MIN, C_MAX = 0.05, 3.0
"""Exponents looked at. Below, a power law is as good as a logarithm; above, only the smallest size would bend."""

VARIANCE_POWERS = (-1.0, 2.0)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Quantity:
    """p·a + q(c)·s, where y = a + s·x and x = (n / scale)^−c: the asymptote, the value at a size, or b.

    p: number; q: (G,), for each c of the grid. noise: (S,) variance of the quantity itself in units of that of an
    observation of weight 1 (0 for a parameter; 1 / weight for a new observation).
    """

    p: float
    q: Floats
    noise: Floats | float = 0.0


class Lines:
    """The best line for each c of a grid: (G, S) for G exponents and S data sets of m points."""

    def __init__(self, n: Floats, y: Floats, weights: Floats, grid: Floats, ceiling: float):
        """n: (m,) sizes; y: (m, S); weights: (m, S), positive; grid: (G,) rising; ceiling: the highest asymptote."""
        x = (n / n.max())[None, :] ** -grid[:, None]
        self.mass = weights.sum(axis=0)
        centre = (weights * y).sum(axis=0) / self.mass
        away = y - centre
        self.x_mean = (x @ weights) / self.mass
        self.x_spread = (x**2) @ weights - self.mass * self.x_mean**2
        joint = x @ (weights * away)
        slope = np.minimum(joint / self.x_spread, 0.0)  # b ≥ 0: more data never hurt
        whole = (weights * away**2).sum(axis=0)
        asymptote = centre - slope * self.x_mean
        rss = whole - 2 * slope * joint + slope**2 * self.x_spread
        # Where the line would end above the ceiling, it starts there, and only its slope is free.
        self.pinned = asymptote > ceiling
        self.x_square = self.x_spread + self.mass * self.x_mean**2
        to_ceiling = joint + self.mass * self.x_mean * (centre - ceiling)
        pinned_slope = np.minimum(to_ceiling / self.x_square, 0.0)
        above = whole + self.mass * (centre - ceiling) ** 2
        pinned_rss = above - 2 * pinned_slope * to_ceiling + pinned_slope**2 * self.x_square
        self.asymptote = np.where(self.pinned, ceiling, asymptote)
        self.slope = np.where(self.pinned, pinned_slope, slope)
        self.rss = np.maximum(np.where(self.pinned, pinned_rss, rss), 0.0)
        self.best = self.rss.argmin(axis=0)
        self.least = self.rss.min(axis=0)
        self.freedom = n.size - 3

    @property
    def variance(self) -> Floats:
        """(S,) variance of an observation of weight 1."""
        return self.least / self.freedom

    def of(self, quantity: Quantity) -> tuple[Floats, Floats]:
        """(G, S) best values of a quantity, and their variances for observations of weight 1 and variance 1."""
        q = quantity.q[:, None]
        value = quantity.p * self.asymptote + q * self.slope
        free = quantity.p**2 / self.mass + (q - quantity.p * self.x_mean) ** 2 / self.x_spread
        return value, np.where(self.pinned, q**2 / self.x_square, free) + quantity.noise

    def distance(self, quantity: Quantity, truth: Floats | float) -> Floats:
        """(S,) how far a true value lies off: by how much it raises the least sum of squares, in variances."""
        value, variance = self.of(quantity)
        raised = self.rss + (truth - value) ** 2 / np.maximum(variance, 1e-300)
        return (raised.min(axis=0) - self.least) / np.maximum(self.variance, 1e-300)

    def distance_of_exponent(self, index: int) -> Floats:
        """(S,) the same for the c at this place of the grid."""
        return (self.rss[index] - self.least) / np.maximum(self.variance, 1e-300)

    def limits(self, quantity: Quantity, critical: float) -> tuple[float, float]:
        """Lowest and highest value of a quantity whose distance is at most `critical`, of the first data set."""
        value, variance = self.of(quantity)
        room = self.least[0] + critical * self.variance[0] - self.rss[:, 0]
        inside = room >= 0
        reach = np.sqrt(variance[inside, 0] * room[inside])
        return float((value[inside, 0] - reach).min()), float((value[inside, 0] + reach).max())

    def exponent_limits(self, grid: Floats, critical: float) -> tuple[float, float]:
        """Lowest and highest c whose distance is at most `critical`, of the first data set, between grid points too."""
        over = self.rss[:, 0] - self.least[0] - critical * self.variance[0]
        inside = np.flatnonzero(over <= 0)
        first, last = int(inside[0]), int(inside[-1])

        def crossing(i: int, j: int) -> float:
            return float(grid[i] + (grid[j] - grid[i]) * over[i] / (over[i] - over[j]))

        low = float(grid[0]) if first == 0 else crossing(first, first - 1)
        high = float(grid[-1]) if last == grid.size - 1 else crossing(last, last + 1)
        return low, high


def size_groups(n: Floats) -> Ints:
    """(m,) numbers of the sizes, 0 up: sizes within a fifth of the group's smallest are one.

    Fractions keep lesions whole, so another subset seed gives a few images more or less.
    """
    order = np.argsort(n, kind="stable")
    group = np.empty(n.size, dtype=np.int64)
    start, current = n[order[0]], 0
    for i in order:
        if n[i] > 1.2 * start:
            start, current = n[i], current + 1
        group[i] = current
    return group


def variance_power(n: Floats, y: Floats, groups: Ints) -> tuple[Floats, float]:
    """(S,) p of a noise variance that falls as n^−p, from the spread of the runs of each size, and its standard error.

    n: (m,); y: (m, S); groups: (m,). The logs of the spreads are a line in log n; each counts by the variance of the
    log of a chi-squared. Within VARIANCE_POWERS; 0 (equal noise everywhere) where fewer than three sizes have two runs.
    """
    from scipy.special import digamma, polygamma

    sizes, spreads, weights = [], [], []
    for g in np.unique(groups):
        rows = np.flatnonzero(groups == g)
        if rows.size >= 2:
            half = (rows.size - 1) / 2
            spread = y[rows].var(axis=0, ddof=1)
            sizes.append(np.log(n[rows]).mean())
            spreads.append((spread, np.log(half) - digamma(half)))
            weights.append(1 / polygamma(1, half))
    if len(sizes) < 3:
        return np.zeros(y.shape[1]), 0.0
    raw = np.array([s for s, _ in spreads])
    floor = np.maximum(1e-4 * raw.mean(axis=0), 1e-300)
    logs = np.log(np.maximum(raw, floor)) + np.array([[c] for _, c in spreads])
    w, x = np.array(weights), np.array(sizes)
    x = x - np.average(x, weights=w)
    steep = float((w * x) @ x)
    return np.clip(-((w * x) @ logs) / steep, *VARIANCE_POWERS), 1 / math.sqrt(steep)


def power_weights(n: Floats, power: Floats) -> Floats:
    """(m, S) weights n^p with mean 1, for (S,) powers."""
    weights = (n / n.max())[:, None] ** power[None, :]
    return weights / weights.mean(axis=0)
