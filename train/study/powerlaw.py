"""The fit of a learning curve `y = a − b·n^−c`, and its intervals.

For a given c the rest is a straight line, so the least sum of squares (`rss`) is computed for every c of a grid. As a
function of one quantity, everything else free, it is the profile of that quantity. The values whose profile stays under
a limit form an interval that follows the curvature of the problem (Bates & Watts 1988, "Nonlinear regression analysis
and its applications", section 6.1). The limit comes from runs drawn from the fitted curve.

The point is the one of scipy's `curve_fit`. Intervals from its covariance and Student's t would hold the truth less
often: in 91 to 95 % of 1,000 simulated studies of seven sizes, where these hold it in 94 to 95 %, and in 74 to 99 % of
studies of four (docs/coverage.md). Nor can `curve_fit` fit the drawn sets: for 1,000 of them it takes 2.8 to 8.2 s, and
`Lines` takes 4 to 11 ms on the same core, 300 to 1,900 times as fast. The tests compare both.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.metrics.bootstrap import CONFIDENCE

GRID = 160

C_MIN, C_MAX = 0.05, 3.0
"""The range of exponents. Below it a power law looks like a logarithm; above it only the smallest size differs."""

CEILING = 1.0
"""The highest possible score, and so the highest asymptote."""

VARIANCE_POWERS = (-1.0, 2.0)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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

    n: (m,); y: (m, S); groups: (m,). A line is fitted to the logs of the spreads over log n, each weighted by the
    variance of the log of a chi-squared. Within VARIANCE_POWERS; 0 (equal noise everywhere) where fewer than three
    sizes have two runs.
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
    line, covariance = np.polyfit(sizes, logs, 1, w=np.sqrt(weights), cov="unscaled")
    return np.clip(-line[0], *VARIANCE_POWERS), math.sqrt(float(covariance[0, 0, 0]))


def power_weights(n: Floats, power: Floats) -> Floats:
    """(m, S) weights n^p with mean 1, for (S,) powers."""
    weights = (n / n.max())[:, None] ** power[None, :]
    return weights / weights.mean(axis=0)


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

    def __init__(self, n: Floats, y: Floats, weights: Floats, grid: Floats):
        """n: (m,) sizes; y: (m, S); weights: (m, S), positive; grid: (G,) rising."""
        x = (n / n.max())[None, :] ** -grid[:, None]
        self.mass = weights.sum(axis=0)
        centre = (weights * y).sum(axis=0) / self.mass
        away = y - centre
        self.x_mean = (x @ weights) / self.mass
        self.x_spread = (x**2) @ weights - self.mass * self.x_mean**2
        joint = x @ (weights * away)
        slope = np.minimum(joint / self.x_spread, 0.0)  # b ≥ 0: more data do no harm
        whole = (weights * away**2).sum(axis=0)
        asymptote = centre - slope * self.x_mean
        rss = whole - 2 * slope * joint + slope**2 * self.x_spread
        # Where the line would end above the ceiling, it starts there, and only its slope is free.
        self.pinned = asymptote > CEILING
        self.x_square = self.x_spread + self.mass * self.x_mean**2
        to_ceiling = joint + self.mass * self.x_mean * (centre - CEILING)
        pinned_slope = np.minimum(to_ceiling / self.x_square, 0.0)
        above = whole + self.mass * (centre - CEILING) ** 2
        pinned_rss = above - 2 * pinned_slope * to_ceiling + pinned_slope**2 * self.x_square
        self.asymptote = np.where(self.pinned, CEILING, asymptote)
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
        """(S,) how far a true value is from the fits: how much it raises the least sum of squares, in variances."""
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

        low, high = [first, max(first - 1, 0)], [last, min(last + 1, grid.size - 1)]
        return float(np.interp(0, over[low], grid[low])), float(np.interp(0, over[high], grid[high]))


class PowerLawFit:
    """The fit `y = a − b·(n / n_max)^−c` of one set of runs, and of sets of runs drawn from the fitted curve.

    The fits of the drawn sets show how far from the truth such a fit, with its estimated weights, may be.
    """

    def __init__(self, n: Floats, y: Floats, *, resamples: int, seed: int):
        """n: (m,) sizes; y: (m,) scores; resamples: sets drawn."""
        self.n = n
        self.groups = size_groups(n)
        powers, self.power_error = variance_power(n, y[:, None], self.groups)
        self.power = float(powers[0])
        self.weights = power_weights(n, np.array([self.power]))[:, 0]
        coarse = np.geomspace(C_MIN, C_MAX, 80)
        self.grid = self._refined(coarse, Lines(n, y[:, None], self.weights[:, None], coarse))
        self.a, self.b, self.c = self._least_squares(y)
        self.grid = np.unique(np.append(self.grid, self.c))
        self.lines = Lines(n, y[:, None], self.weights[:, None], self.grid)
        self.sd = math.sqrt(float(self.lines.variance[0]))
        # Each drawn set has weights of its own, estimated from it. The F distribution takes weights as known, and 95 %
        # intervals from it cover 91 %.
        rng = np.random.default_rng(seed)
        expected = self.a - self.b * (n / n.max()) ** -self.c
        true_power = np.clip(self.power + self.power_error * rng.normal(size=resamples), *VARIANCE_POWERS)
        noise = self.sd / np.sqrt(power_weights(n, true_power))
        drawn = expected[:, None] + noise * rng.normal(size=(n.size, resamples))
        self.drawn_power, _ = variance_power(n, drawn, self.groups)
        self.drawn_weights = power_weights(n, self.drawn_power)
        self.drawn = Lines(n, drawn, self.drawn_weights, self.grid)
        self.luck = rng.normal(size=resamples)

    def _refined(self, coarse: Floats, lines: Lines) -> Floats:
        """A grid that is fine wherever c may be: the usual limit times four."""
        inside = coarse[lines.rss[:, 0] <= lines.least[0] + 16 * max(float(lines.variance[0]), 1e-12)]
        return np.union1d(coarse, np.geomspace(max(inside[0] / 1.05, C_MIN), min(inside[-1] * 1.05, C_MAX), GRID))

    def _least_squares(self, y: Floats) -> tuple[float, float, float]:
        """a, b (for n in units of the largest) and c of least weighted squares, by scipy, from the best of the grid."""
        from scipy.optimize import curve_fit

        lines = Lines(self.n, y[:, None], self.weights[:, None], self.grid)
        i = int(lines.best[0])
        start = (float(lines.asymptote[i, 0]), max(-float(lines.slope[i, 0]), 1e-9), float(self.grid[i]))
        bounds = ([-np.inf, 0.0, C_MIN], [CEILING, np.inf, C_MAX])
        start = tuple(np.clip(start, np.array(bounds[0]) + 1e-12, np.array(bounds[1]) - 1e-12))
        found, _ = curve_fit(
            lambda x, a, b, c: a - b * x**-c,
            self.n / self.n.max(),
            y,
            p0=start,
            sigma=1 / np.sqrt(self.weights),
            bounds=bounds,
            xtol=1e-12,
            ftol=1e-12,
        )
        return float(found[0]), float(found[1]), float(found[2])

    def _critical(self, distances: Floats) -> float:
        """The distance that the true value exceeds in 5 % of the drawn sets; at least that of the F distribution."""
        from scipy.stats import f

        freedom = self.lines.freedom
        return max(float(np.quantile(distances, CONFIDENCE)), float(f.ppf(CONFIDENCE, 1, freedom)))

    def interval(self, p: float, q: Floats, value: float) -> tuple[float, float]:
        """95 % interval of the quantity p·a + q·s (see Quantity); `value` is what it is on the fitted curve."""
        quantity = Quantity(p, q)
        return self.lines.limits(quantity, self._critical(self.drawn.distance(quantity, value)))

    def exponent_interval(self) -> tuple[float, float]:
        """95 % interval of c."""
        index = int(np.searchsorted(self.grid, self.c))
        return self.lines.exponent_limits(self.grid, self._critical(self.drawn.distance_of_exponent(index)))

    def value_at(self, n: float) -> tuple[float, float, float]:
        """Curve at n and its 95 % interval."""
        value = self.a - self.b * float(n / self.n.max()) ** -self.c
        low, high = self.interval(1.0, (n / self.n.max()) ** -self.grid, value)
        return value, max(low, 0.0), min(high, CEILING)

    def new_mean_at(self, n: float, runs: int) -> tuple[float, float, float]:
        """Curve at n and the interval that holds the mean of so many new runs there in 95 % of cases."""
        x = n / self.n.max()
        last = int(self.n.argmax())
        q = x**-self.grid
        mine = 1 / (np.array([x**self.power]) * self.weights[last] * runs)
        drawn = 1 / (x**self.drawn_power * self.drawn_weights[last] * runs)
        value = self.a - self.b * float(x) ** -self.c
        met = value + self.sd * math.sqrt(float(mine[0])) * self.luck
        distances = self.drawn.distance(Quantity(1.0, q, drawn), met)
        low, high = self.lines.limits(Quantity(1.0, q, mine), self._critical(distances))
        return value, max(low, 0.0), min(high, CEILING)

    def lack_of_fit(self, y: Floats) -> float | None:
        """p of the F test of the size means against the curve; None without repeated sizes or spare sizes."""
        from scipy.stats import f

        means = np.bincount(self.groups, self.weights * y) / np.bincount(self.groups, self.weights)
        spare, repeats = means.size - 3, y.size - means.size
        pure = float((self.weights * (y - means[self.groups]) ** 2).sum())
        if spare < 1 or repeats < 1 or pure <= 0:
            return None
        return float(f.sf(max(float(self.lines.least[0]) - pure, 0.0) / spare / (pure / repeats), spare, repeats))
