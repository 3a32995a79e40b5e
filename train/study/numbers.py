"""How scores, differences and their intervals are written in texts, tables and charts."""

from collections.abc import Callable
from typing import Any

NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_auc": "macro AUC",
    "average_precision": "average precision",
    "partial_auc_above_80_sensitivity": "partial AUC above 80 % sensitivity (0 to 0.2)",
}


def percent(value: float | None, digits: int = 1) -> str:
    """A share as `61.2 %`; a dash where unknown."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def score(metric: str, value: float | None) -> str:
    """A metric as it is usually written: balanced accuracy in percent, areas under curves as 0.912."""
    if value is None:
        return "–"
    return f"{value:.3f}" if "auc" in metric else percent(value)


def points(metric: str, value: float | None) -> str:
    """A difference with its sign: percentage points, or an area."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if "auc" in metric else f"{100 * value:+.1f} points"


def between(metric: str, cell: dict[str, Any], *more: str, write: Callable[[str, float | None], str] = score) -> str:
    """`61.2 % (58.0 % to 64.1 %)`; without the interval where there is none. write: `score` or `points`.

    more: follows the interval in the parentheses, such as a p value.
    """
    known = cell["low"] is not None and cell["high"] is not None
    ends = [f"{write(metric, cell['low'])} to {write(metric, cell['high'])}"] if known else []
    inside = ", ".join([*ends, *more])
    return write(metric, cell["value"]) + (f" ({inside})" if inside else "")


def p_value(p: float | None) -> str:
    """A p value with its relation: `= 0.031`, `< 0.001`."""
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"
