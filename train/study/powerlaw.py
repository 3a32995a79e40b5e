"""One fit of a learning curve and how sure it is: profiles, calibrated on sets of runs drawn from the fitted curve."""

import math

import numpy as np
from numpy.typing import NDArray

from train.metrics.bootstrap import CONFIDENCE
from train.study.profile import (
    C_MAX,
    C_MIN,
    VARIANCE_POWERS,
    Lines,
    Quantity,
    power_weights,
    size_groups,
    variance_power,
)

GRID = 160

Floats = NDArray[np.float64]


class PowerLawFit:
    """The fit `y = a − b·(n / n_max)^−c` of one set of runs, and of sets drawn from it.

    The drawn sets tell how far the true values may lie off when fits go as this one did, weights and all.
    """

    def __init__(self, n: Floats, y: Floats, *, ceiling: float, resamples: int, seed: int):
        """n: (m,) sizes; y: (m,) scores; ceiling: the highest asymptote; resamples: sets drawn."""
        self.n, self.ceiling = n, ceiling
        self.groups = size_groups(n)
        powers, self.power_error = variance_power(n, y[:, None], self.groups)
        self.power = float(powers[0])
        self.weights = power_weights(n, np.array([self.power]))[:, 0]
        coarse = np.geomspace(C_MIN, C_MAX, 80)
        self.grid = self._refined(coarse, Lines(n, y[:, None], self.weights[:, None], coarse, ceiling))
        self.a, self.b, self.c = self._least_squares(y)
        self.grid = np.unique(np.append(self.grid, self.c))
        self.lines = Lines(n, y[:, None], self.weights[:, None], self.grid, ceiling)
        self.sd = math.sqrt(float(self.lines.variance[0]))
        # Runs drawn from the curve, with weights estimated anew from each set: the F distribution does not know that
        # weights are estimates, and with it 95 % intervals cover 91 %.
        rng = np.random.default_rng(seed)
        expected = self.a - self.b * (n / n.max()) ** -self.c
        true_power = np.clip(self.power + self.power_error * rng.normal(size=resamples), *VARIANCE_POWERS)
        noise = self.sd / np.sqrt(power_weights(n, true_power))
        drawn = expected[:, None] + noise * rng.normal(size=(n.size, resamples))
        self.drawn_power, _ = variance_power(n, drawn, self.groups)
        self.drawn_weights = power_weights(n, self.drawn_power)
        self.drawn = Lines(n, drawn, self.drawn_weights, self.grid, ceiling)
        self.luck = rng.normal(size=resamples)

    def _refined(self, coarse: Floats, lines: Lines) -> Floats:
        """A grid that is fine where c may lie, as far as four times the usual limit."""
        inside = coarse[lines.rss[:, 0] <= lines.least[0] + 16 * max(float(lines.variance[0]), 1e-12)]
        return np.union1d(coarse, np.geomspace(max(inside[0] / 1.05, C_MIN), min(inside[-1] * 1.05, C_MAX), GRID))

    def _least_squares(self, y: Floats) -> tuple[float, float, float]:
        """a, b (for n in units of the largest) and c of least weighted squares, by scipy, from the best of the grid."""
        from scipy.optimize import curve_fit

        lines = Lines(self.n, y[:, None], self.weights[:, None], self.grid, self.ceiling)
        i = int(lines.best[0])
        start = (float(lines.asymptote[i, 0]), max(-float(lines.slope[i, 0]), 1e-9), float(self.grid[i]))
        bounds = ([-np.inf, 0.0, C_MIN], [self.ceiling, np.inf, C_MAX])
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
        """The distance that a true value exceeds in 5 % of the drawn sets; never below the F distribution's."""
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
        return value, low, min(high, self.ceiling)

    def new_mean_at(self, n: float, runs: int) -> tuple[float, float, float]:
        """Curve at n and the interval that holds the mean of so many new runs there in 95 % of cases."""
        x = n / self.n.max()
        last = int(self.n.argmax())

        def noise(power: Floats, weights: Floats) -> Floats:
            return 1 / (x**power * weights[last] * runs)

        q = x**-self.grid
        mine = noise(np.array([self.power]), self.weights[:, None])
        value = self.a - self.b * float(x) ** -self.c
        met = value + self.sd * math.sqrt(float(mine[0])) * self.luck
        distances = self.drawn.distance(Quantity(1.0, q, noise(self.drawn_power, self.drawn_weights)), met)
        low, high = self.lines.limits(Quantity(1.0, q, mine), self._critical(distances))
        return value, low, high

    def lack_of_fit(self, y: Floats) -> float | None:
        """p of the F test of the size means against the curve; None without repeated sizes or spare sizes."""
        from scipy.stats import f

        sizes = np.unique(self.groups)
        spare, repeats = sizes.size - 3, y.size - sizes.size
        pure = 0.0
        for g in sizes:
            rows = self.groups == g
            pure += float((self.weights[rows] * (y[rows] - np.average(y[rows], weights=self.weights[rows])) ** 2).sum())
        if spare < 1 or repeats < 1 or pure <= 0:
            return None
        return float(f.sf(max(float(self.lines.least[0]) - pure, 0.0) / spare / (pure / repeats), spare, repeats))
