"""Small charts as SVG text: scales, axes, points, lines, bands, bars. Colours are CSS classes, so pages choose them.

A series is told by its colour, its marker and its dashes, so it can be read without colour and in print.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

LARGEST = 1.4
"""How much a chart may grow with the page: its text is 12 px in its own coordinates."""

MARKERS = 8
"""Different markers; the ninth series has the first one again, with other dashes and colour."""

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 1 2 1 2")


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic. ticks: (value, label), lowest first."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end; values outside are put on the edge."""
        if self.log:
            at = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            at = (value - self.low) / (self.high - self.low)
        return min(max(at, 0.0), 1.0)


def linear(
    low: float,
    high: float,
    label: Callable[[float], str],
    *,
    wanted: int = 5,
    limits: tuple[float, float] | None = None,
) -> Scale:
    """A linear scale that holds low to high, with about `wanted` round ticks; within `limits` where they are given."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    if limits is not None:
        low, high = max(low, limits[0]), min(high, limits[1])
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if limits is not None:
        first = max(first, math.ceil(limits[0] / step - 1e-9))
        last = min(last, math.floor(limits[1] / step + 1e-9))
    ticks = tuple((i * step, label(i * step)) for i in range(first, last + 1))
    return Scale(min(ticks[0][0], low), max(ticks[-1][0], high), False, ticks)


def logarithmic(low: float, high: float, label: Callable[[float], str], *, at: Sequence[float] = ()) -> Scale:
    """A logarithmic scale from low to high (above 0) with a little room; ticks at the named values, else 1, 2, 5."""
    room = max((high / low) ** 0.05, 1.08)
    low, high = low / room, high * room
    if not at:
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            at = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
            if len(at) <= 6:
                break
        while len(at) > 6:
            at = at[::2]
        at = at or [math.sqrt(low * high)]
    return Scale(low, high, True, tuple((value, label(value)) for value in at))


class Label:
    """How numbers on an axis are written: `counts`, `percent` (of 0 to 1), `plain` or `seconds`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, value: float) -> str:
        """The text of a number."""
        if self.kind == "percent":
            return f"{100 * value:.3g} %"
        if self.kind == "counts":
            return short(value)
        if self.kind == "seconds":
            return (
                f"{value:.3g} s"
                if value < 120
                else f"{value / 60:.3g} min"
                if value < 7200
                else f"{value / 3600:.3g} h"
            )
        return f"{value:.3g}"


def short(value: float) -> str:
    """A count in at most five characters or so: 5,608, 25.6k, 11.2M, 3.1G, 2.4T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass
class Plot:
    """One chart with two axes, in a coordinate system of width × height px that scales with the page.

    name: unique in a page. title: what is shown. told: the same in words, for those who do not see it.
    """

    name: str
    title: str
    told: str
    x: Scale
    y: Scale
    x_label: str
    y_label: str
    width: int = 440
    height: int = 300
    left: int = 60
    right: int = 20
    top: int = 14
    bottom: int = 44
    parts: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Horizontal place of a value."""
        return self.left + self.x.share(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Vertical place of a value."""
        return self.height - self.bottom - self.y.share(value) * (self.height - self.bottom - self.top)

    # ------------------------------------------------------------------ marks; `series` picks colour, marker and dashes

    def line(self, points: Sequence[tuple[float, float]], series: int, *, kind: str = "line") -> None:
        """A line through (x, y) points; nothing for a single one."""
        if len(points) < 2:
            return
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        dash = (
            f' stroke-dasharray="{DASHES[series % len(DASHES)]}"'
            if DASHES[series % len(DASHES)] and kind == "line"
            else ""
        )
        self.parts.append(f'<polyline class="{kind} c{series % MARKERS}" points="{path}"{dash}/>')

    def band(self, points: Sequence[tuple[float, float, float]], series: int, *, kind: str = "band") -> None:
        """The area between (x, low, high) points."""
        there = [f"{self.px(x):.1f},{self.py(high):.1f}" for x, _, high in points]
        back = [f"{self.px(x):.1f},{self.py(low):.1f}" for x, low, _ in reversed(points)]
        self.parts.append(f'<polygon class="{kind} c{series % MARKERS}" points="{" ".join(there + back)}"/>')

    def point(self, x: float, y: float, series: int, *, told: str = "", size: float = 4.0, kind: str = "point") -> None:
        """A series' marker; `told` is shown when the mouse rests on it."""
        title = f"<title>{escape(told)}</title>" if told else ""
        path = marker(series, self.px(x), self.py(y), size)
        self.parts.append(f'<path class="{kind} c{series % MARKERS}" d="{path}">{title}</path>')

    def interval(self, x: float, low: float, high: float, series: int) -> None:
        """A vertical error bar."""
        at, top, bottom = self.px(x), self.py(high), self.py(low)
        self.parts.append(
            f'<path class="bar c{series % MARKERS}" d="M{at:.1f} {top:.1f}V{bottom:.1f}M{at - 3:.1f} {top:.1f}h6'
            f'M{at - 3:.1f} {bottom:.1f}h6"/>'
        )

    def across(self, y: float, low: float, high: float, series: int) -> None:
        """A horizontal error bar."""
        at, left, right = self.py(y), self.px(low), self.px(high)
        self.parts.append(
            f'<path class="bar c{series % MARKERS}" d="M{left:.1f} {at:.1f}H{right:.1f}M{left:.1f} {at - 3:.1f}v6'
            f'M{right:.1f} {at - 3:.1f}v6"/>'
        )

    def box(self, x: tuple[float, float], y: tuple[float, float], series: int, *, told: str = "") -> None:
        """A filled rectangle between two x and two y values."""
        left, right = sorted(self.px(v) for v in x)
        top, bottom = sorted(self.py(v) for v in y)
        self.parts.append(
            f'<rect class="box c{series % MARKERS}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - top:.1f}"><title>{escape(told)}</title></rect>'
        )

    def rule(self, *, x: float | None = None, y: float | None = None) -> None:
        """A thin line across the chart at a value."""
        if x is not None:
            self.parts.append(f'<path class="rule" d="M{self.px(x):.1f} {self.top}V{self.height - self.bottom}"/>')
        if y is not None:
            self.parts.append(f'<path class="rule" d="M{self.left} {self.py(y):.1f}H{self.width - self.right}"/>')

    def text(self, x_px: float, y_px: float, text: str, *, anchor: str = "start", kind: str = "ink") -> None:
        """Text at a place in px."""
        self.parts.append(
            f'<text class="{kind}" x="{x_px:.1f}" y="{y_px:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def svg(self, *, x_ticks: bool = True, y_ticks: bool = True) -> str:
        """The chart as an `<svg>` element."""
        right, base = self.width - self.right, self.height - self.bottom
        under: list[str] = []
        for value, label in self.x.ticks if x_ticks else ():
            at = self.px(value)
            under.append(f'<path class="grid" d="M{at:.1f} {self.top}V{base}"/>')
            under.append(f'<text class="tick" x="{at:.1f}" y="{base + 16}" text-anchor="middle">{escape(label)}</text>')
        for value, label in self.y.ticks if y_ticks else ():
            at = self.py(value)
            under.append(f'<path class="grid" d="M{self.left} {at:.1f}H{right}"/>')
            under.append(
                f'<text class="tick" x="{self.left - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>'
            )
        under.append(f'<path class="axis" d="M{self.left} {self.top}V{base}H{right}"/>')
        roomy = 6.6 * len(self.x_label) < right - self.left  # a letter is about 6.6 px wide
        middle = (self.left + right) / 2 if roomy else self.width / 2
        under.append(
            f'<text class="tick" x="{middle}" y="{self.height - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        if self.y_label:
            half = (self.top + base) / 2
            under.append(
                f'<text class="tick" transform="translate(12 {half}) rotate(-90)" text-anchor="middle">'
                f"{escape(self.y_label)}</text>"
            )
        return wrap(self.name, self.title, self.told, self.width, self.height, under + self.parts)


def wrap(name: str, title: str, told: str, width: float, height: float, parts: Sequence[str]) -> str:
    """An `<svg>` element with a title and a description that screen readers read out."""
    return (
        f'<svg class="chart" id="{name}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'style="max-width:{LARGEST * width:.0f}px" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(told)}</desc>{"".join(parts)}</svg>'
    )


def marker(series: int, x: float, y: float, r: float) -> str:
    """The path of a series' marker about (x, y): circle, square, triangles, diamond, cross, plus, hexagon."""
    k = series % MARKERS
    if k == 0:
        return f"M{x - r:.1f} {y:.1f}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0Z"
    if k == 5:  # a cross and a plus are drawn as outlines of some width, so that all markers are filled alike
        turned = [_turn(p, 45.0) for p in _plus(r * 1.25)]
        return _polygon(x, y, turned)
    if k == 6:
        return _polygon(x, y, _plus(r * 1.25))
    corners = {1: (4, 45.0, 1.25), 2: (3, 90.0, 1.4), 3: (4, 0.0, 1.4), 4: (3, -90.0, 1.4), 7: (6, 0.0, 1.15)}
    count, turn, size = corners[k]
    angles = [math.radians(turn + i * 360 / count) for i in range(count)]
    return _polygon(x, y, [(size * r * math.cos(a), -size * r * math.sin(a)) for a in angles])


def _plus(r: float) -> list[tuple[float, float]]:
    w = r * 0.38
    return [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w), (-w, -w)]


def _turn(point: tuple[float, float], degrees: float) -> tuple[float, float]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point[0] * c - point[1] * s, point[0] * s + point[1] * c


def _polygon(x: float, y: float, corners: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in corners) + "Z"


def legend(names: Sequence[tuple[int, str]]) -> str:
    """What the marker, dashes and colour of each (series, name) stand for, as HTML that wraps with the page."""
    items = []
    for series, name in names:
        mark = f'<svg viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">{_legend_mark(series, 1, 7)}</svg>'
        items.append(f"<span>{mark}{escape(name)}</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def legend_below(names: Sequence[tuple[int, str]], width: float, top: float) -> tuple[str, float]:
    """The same as SVG elements below a chart of `width` px that ends at `top`; and the height that they need."""
    parts, x, y = [], 8.0, top + 12.0
    for series, name in names:
        needed = 44 + 7.5 * len(name) + 14  # letters are 12 px high, and so wide at most on average
        if x > 8.0 and x + needed > width:
            x, y = 8.0, y + 20.0
        parts.append(_legend_mark(series, x, y))
        parts.append(f'<text class="ink" x="{x + 40:g}" y="{y + 4:g}">{escape(name)}</text>')
        x += needed
    return "".join(parts), y + 12.0 - top


def _legend_mark(series: int, x: float, y: float) -> str:
    """A piece of a series' line, 32 px long from x, with its marker."""
    dash = f' stroke-dasharray="{DASHES[series % len(DASHES)]}"' if DASHES[series % len(DASHES)] else ""
    colour = f"c{series % MARKERS}"
    return (
        f'<polyline class="line {colour}" points="{x:g},{y:g} {x + 32:g},{y:g}"{dash}/>'
        f'<path class="point {colour}" d="{marker(series, x + 16, y, 4)}"/>'
    )
