"""How scores, differences and their intervals are written in texts, tables and charts."""

from typing import Any

NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_auc": "macro AUC",
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


def between(metric: str, cell: dict[str, Any]) -> str:
    """`61.2 % (58.0 % to 64.1 %)`, or without the interval where there is none."""
    if cell["low"] is None or cell["high"] is None:
        return score(metric, cell["value"])
    return f"{score(metric, cell['value'])} ({score(metric, cell['low'])} to {score(metric, cell['high'])})"


def p_value(p: float | None) -> str:
    """A p value with its relation: `= 0.031`, `< 0.001`."""
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"
