"""One picture of a report: drawn by matplotlib, as SVG for the page and as SVG, PDF and PNG for papers.

A picture is drawn in the light colours. In the SVG text of the page every colour becomes a CSS variable, so the page's
style sheet chooses light or dark; a file that stands alone keeps the light ones and adds rules for a dark browser.
Text stays text. The same numbers give the same bytes. Sizes are points: 4/3 CSS px, 1/72 inch on paper.
"""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

LIGHT = {
    "page": "#ffffff", "ink": "#1c2128", "muted": "#57606a", "line": "#d0d7de", "soft": "#f4f6f8",
    "c0": "#0b5cad", "c1": "#b83c00", "c2": "#0a7048", "c3": "#8137a6",
    "c4": "#7a5c00", "c5": "#0b7285", "c6": "#b0124a", "c7": "#4b5563",
}  # fmt: skip
DARK = {
    "page": "#14181d", "ink": "#e6eaef", "muted": "#a3adb8", "line": "#39424d", "soft": "#1d232a",
    "c0": "#7cb8ff", "c1": "#ff9d6b", "c2": "#5fd0a0", "c3": "#d3a4f5",
    "c4": "#e3c262", "c5": "#68d1e6", "c6": "#ff8fb0", "c7": "#c3cad3",
}  # fmt: skip
"""Colours by name. c0 to c7 are the series; each stands out from the page by a contrast of at least 4.5."""

COLOURS = 8
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "h")
MARKER_SIZES = (1.0, 0.95, 1.1, 0.9, 1.1, 1.2, 1.35, 1.1)
"""Shapes of the series, and factors by which they look equally large."""

DASHES = ((), (5, 2), (1.5, 2), (6, 2, 1.5, 2), (3, 1.5), (8, 3), (1, 3), (4, 1.5, 1, 1.5, 1, 1.5))
"""Dashes of the series in line widths. With the markers they tell series apart without colour."""

LETTER = 5.4
"""Mean width of a letter of SMALL text."""

TEXT, SMALL = 9.0, 8.5

LARGEST = 1.3
"""How much a picture may grow with the page."""

FONTS = "system-ui,'DejaVu Sans',Verdana,sans-serif"

STYLE: dict[str, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dermscale",
    "pdf.fonttype": 42,
    "font.size": TEXT,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": TEXT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": LIGHT["page"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "butt",
}


def styled() -> AbstractContextManager[None]:
    """matplotlib's settings while a picture is made or written; the user's own are untouched."""
    return matplotlib.style.context(["default", STYLE])


def colour(series: int) -> str:
    """The light colour of a series."""
    return LIGHT[f"c{series % COLOURS}"]


def look(series: int, size: float = 5.0) -> dict[str, Any]:
    """Colour, marker and dashes of a series, for a line of matplotlib. The ninth differs from the first by dashes."""
    return {
        "color": colour(series),
        "marker": MARKERS[series % len(MARKERS)],
        "linestyle": _dashes(series),
        "linewidth": 1.5,
        "markersize": size * MARKER_SIZES[series % len(MARKERS)],
        "markeredgecolor": LIGHT["page"],
        "markeredgewidth": 0.5,
        "clip_on": False,
    }


def _dashes(series: int) -> Any:
    dashes = DASHES[(series + series // COLOURS) % len(DASHES)]
    return (0, dashes) if dashes else "-"


# ------------------------------------------------------------------ numbers on an axis


def seconds(value: float) -> str:
    """A duration: `42 s`, `3.5 min`, `2 h`."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def short(value: float) -> str:
    """A count in at most five characters or so: 5,608, 25.6k, 11.2M, 3.1G, 2.4T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shares(value: float) -> str:
    """A share on an axis: `60 %`."""
    return f"{100 * value:.3g} %"


def signed(value: float) -> str:
    """A difference: `+5`, `−2.5`, `0`."""
    return f"{value:+.3g}".replace("-", "−") if round(value, 9) else "0"


def plain(value: float) -> str:
    """Three digits: `0.85`."""
    return f"{value:.3g}"


# ------------------------------------------------------------------ a picture


class Picture:
    """One chart with two axes. What is drawn can be named for the page: a class, and words for the mouse.

    name: unique in a page, letters, digits and dashes. title: what is shown. alt: the same with its main numbers, for
    those who do not see it. size: width and height, margins: left, right, top and bottom of the axes, points. wide: it
    has a row of the page for itself.
    """

    def __init__(
        self,
        name: str,
        title: str,
        *,
        size: tuple[float, float] = (330.0, 225.0),
        margins: tuple[float, float, float, float] = (46.0, 14.0, 12.0, 34.0),
        wide: bool = False,
    ) -> None:
        self.name, self.title, self.alt = name, title, ""
        self.size, self.margins, self.wide = size, margins, wide
        self.words: list[str] = []
        with styled():
            self.figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
            self.axes = self.figure.add_axes(self._place())

    def _place(self, below: float = 0.0) -> tuple[float, float, float, float]:
        """Where the axes are, in shares of the figure, with `below` more points beneath them."""
        left, right, top, bottom = self.margins
        width, height = self.size[0], self.size[1] + below
        return left / width, (bottom + below) / height, 1 - (left + right) / width, 1 - (top + bottom + below) / height

    def mark(self, kind: str, words: str = "") -> str:
        """The gid of something drawn: its CSS class, and words shown when the mouse rests on it."""
        self.words.append(words)
        return f"{kind}~{len(self.words) - 1}"

    # ------------------------------------------------------------------ axes

    def heading(self, text: str, *, pad: float = 7) -> None:
        """A bold line above the axes, from their left end, `pad` points higher."""
        self.axes.set_title(text, pad=pad)

    def labels(self, x: str, y: str = "") -> None:
        """What the axes show."""
        self.axes.set_xlabel(x, labelpad=4)
        if y:
            self.axes.text(
                10 / self.size[0], 0.5 * (1 + (self.margins[3] - self.margins[2]) / self.size[1]), y, rotation=90,
                rotation_mode="anchor", ha="center", va="center", transform=self.figure.transFigure,
            )  # fmt: skip

    def linear(
        self,
        axis: str,
        low: float,
        high: float,
        label: Callable[[float], str],
        *,
        limits: tuple[float, float] | None = None,
        ticks: int = 5,
    ) -> None:
        """A linear axis ("x" or "y") with a little room around low to high, within `limits`, with grid lines."""
        if not high > low:
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        room = 0.04 * (high - low)
        low, high = low - room, high + room
        if limits is not None:
            low, high = max(low, limits[0]), min(high, limits[1])
        (self.axes.set_xlim if axis == "x" else self.axes.set_ylim)(low, high)
        where = self.axes.xaxis if axis == "x" else self.axes.yaxis
        where.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
        self._ticks(where, label)

    def logarithmic(self, low: float, high: float, label: Callable[[float], str], *, at: Sequence[float] = ()) -> None:
        """A logarithmic x axis from low to high with a little room; ticks at the given values, else at 1, 2, 5."""
        room = max((high / low) ** 0.04, 1.06)
        low, high = low / room, high * room
        if not at:
            decades = 10.0 ** np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                at = [float(s * d) for d in decades for s in steps if low <= s * d <= high]
                if len(at) <= 6:
                    break
            at = at[:: 1 + len(at) // 7] or [float(np.sqrt(low * high))]
        self.axes.set_xscale("log")
        self.axes.set_xlim(low, high)
        self.axes.xaxis.set_major_locator(FixedLocator(list(at)))
        self.axes.xaxis.set_minor_locator(NullLocator())
        self._ticks(self.axes.xaxis, label)

    def _ticks(self, axis: Any, label: Callable[[float], str]) -> None:
        axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
        axis.grid(True, color=LIGHT["line"], linewidth=0.6, clip_on=False)

    def rows(self, names: Sequence[str]) -> None:
        """A y axis of named rows: 0 for the first, at the top."""
        self.axes.set_ylim(len(names) - 0.5, -0.5)
        self.axes.set_yticks(range(len(names)), names, color=LIGHT["ink"])

    # ------------------------------------------------------------------ marks; `series` chooses colour, marker, dashes

    def line(self, x: Sequence[float], y: Sequence[float], series: int, **more: Any) -> None:
        """A line through points, cut off at the upper and lower end of the axes; nothing for a single point."""
        if len(x) > 1:
            style: dict[str, Any] = look(series) | {"marker": ""} | more
            self.axes.plot(x, np.clip(y, *self.axes.get_ylim()), gid=self.mark("line"), **style)

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], series: int, alpha: float) -> None:
        """The area between two lines."""
        lower, upper = (np.clip(values, *self.axes.get_ylim()) for values in (low, high))
        style: dict[str, Any] = {"color": colour(series), "alpha": alpha, "linewidth": 0, "clip_on": False}
        self.axes.fill_between(x, lower, upper, gid=self.mark("band"), **style)

    def point(self, x: float, y: float, series: int, words: str, *, size: float = 5.0, **more: Any) -> None:
        """A series' marker with its words."""
        style: dict[str, Any] = look(series, size) | {"linestyle": ""} | more
        self.axes.plot([x], [y], gid=self.mark("point", words), **style)

    def interval(self, low: float, high: float, at: float, colour: str, *, across: bool = False) -> None:
        """An error bar from low to high, upright or across."""
        ends, same = [low, high], [at, at]
        caps = {
            "marker": "_" if not across else "|",
            "markersize": 5,
            "markeredgewidth": 1.0,
            "markeredgecolor": colour,
        }
        style = {"color": colour, "linewidth": 1.0, "clip_on": False, **caps}
        self.axes.plot(*((ends, same) if across else (same, ends)), gid=self.mark("bar"), **style)

    def at_end(self, names: Sequence[tuple[str, float, int]]) -> None:
        """Names right of the axes: (name, y where its line ends, series), moved apart where they are close."""
        low, high = self.axes.get_ylim()
        height = self.size[1] - self.margins[2] - self.margins[3]
        order = sorted(names, key=lambda one: one[1])
        places = [height * (y - low) / (high - low) for _, y, _ in order]
        for _ in range(200):  # each round moves close neighbours apart; as many as fit beside the axes come to rest
            for i in range(len(places) - 1):
                lack = 10.5 - (places[i + 1] - places[i])
                if lack > 0.01:
                    places[i], places[i + 1] = places[i] - lack / 2, places[i + 1] + lack / 2
            move = max(0.0, -places[0]) - max(0.0, places[-1] - height)
            places = [place + (move if abs(move) > 0.01 else 0.0) for place in places]
        for (name, _, series), place in zip(order, places, strict=True):
            where = ((self.size[0] - self.margins[1] + 5) / self.size[0], (place + self.margins[3]) / self.size[1])
            self.axes.text(
                *where, name, color=colour(series), va="center", fontsize=SMALL, transform=self.figure.transFigure
            )

    # ------------------------------------------------------------------ as text and files

    def svg(self) -> str:
        """The `<svg>` element for a page, its colours CSS variables of the names in LIGHT."""
        text = self._drawn(lambda tag: re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda m: f"var(--{_NAMES[m[0]]})", tag))
        most = f"{LARGEST * self.size[0] * 4 / 3:.0f}px"
        return text.replace(' role="img"', f' style="max-width:{most}" role="img"', 1)

    def files(self, legend: Sequence[tuple[int, str]] = ()) -> dict[str, bytes]:
        """SVG, PDF and PNG (300 dpi) by suffix. legend: series and name of what is drawn, added below the axes."""
        if legend:
            self._legend(legend)
        written = {"svg": self._standalone().encode()}
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            with styled():
                self.figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
            written[kind] = buffer.getvalue()
        return written

    def _legend(self, names: Sequence[tuple[int, str]]) -> None:
        """Make the figure higher and put a legend below the axes."""
        wide = 34 + LETTER * max(len(name) for _, name in names)
        columns = max(1, min(len(names), int(self.size[0] / wide)))
        below = 14.0 * -(-len(names) // columns) + 2
        with styled():
            self.figure.set_size_inches(self.size[0] / 72, (self.size[1] + below) / 72)
            self.axes.set_position(self._place(below))
            handles = [Line2D([], [], **look(series)) for series, _ in names]
            self.figure.legend(
                handles, [name for _, name in names], loc="lower center", ncols=columns, frameon=False,
                fontsize=SMALL, handlelength=2.6, columnspacing=1.2, borderpad=0.2, labelspacing=0.4,
            )  # fmt: skip

    def _standalone(self) -> str:
        dark = "".join(
            f'[style*="{part}: {LIGHT[name]}"]{{{part}:{DARK[name]}!important}}'
            for name in LIGHT for part in ("fill", "stroke")
        )  # fmt: skip
        rules = f"text{{font-family:{FONTS}}}*{{stroke-linejoin:round}}@media(prefers-color-scheme:dark){{{dark}}}"
        width, height = (72 * side for side in self.figure.get_size_inches())
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        head = f'<svg {spaces} width="{width:g}pt" height="{height:g}pt" '
        return self._drawn(str).replace("<svg ", head, 1).replace("</desc>", f"</desc><style>{rules}</style>", 1) + "\n"

    def _drawn(self, paint: Callable[[str], str]) -> str:
        """The SVG text, shortened, with its title, description and words. paint: changes the colours of a tag."""
        ids: dict[str, str] = {}

        def tag(match: re.Match[str]) -> str:
            text = re.sub(r"\s+", " ", paint(match.group()))
            group = re.fullmatch(r'<g id="([^"]*)" ?(/?)>', text)
            if group:
                kind, _, number = group[1].partition("~")
                words = self.words[int(number)] if number else ""
                title = f"<title>{escape(words)}</title>" if words else ""
                return "" if group[2] else f'<g class="{kind}">{title}' if number else "<g>"
            text = re.sub(r"(\.\d\d)\d+", r"\1", text)
            text = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", text)
            return re.sub(
                r'(id="|href="#)(m[0-9a-f]{10})',
                lambda m: m[1] + ids.setdefault(m[2], f"{self.name}-{len(ids)}"),
                text,
            )

        buffer = io.StringIO()
        with styled():
            none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(buffer, format="svg", metadata=none)
        drawn = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", buffer.getvalue(), flags=re.S)
        drawn = drawn[drawn.index("<svg") :]
        drawn = re.sub(r"<[^>]+>", tag, drawn)
        drawn = re.sub(r">\s+<", "><", drawn)
        while "<g></g>" in drawn:
            drawn = drawn.replace("<g></g>", "")
        width, height = (72 * side for side in self.figure.get_size_inches())
        name, kind = self.name, "chart wide" if self.wide else "chart"
        return (
            f'<svg class="{kind}" id="{name}" viewBox="0 0 {width:g} {height:g}" role="img" '
            f'aria-labelledby="{name}-t {name}-d">'
            f'<title id="{name}-t">{escape(self.title)}</title><desc id="{name}-d">{escape(self.alt)}</desc>'
            f"{drawn[drawn.index('>') + 1 :].strip()}"
        )


_NAMES = {value: name for name, value in LIGHT.items()}


def swatch(name: str, series: int) -> str:
    """A piece of a series' line with its marker, as an `<svg>` element for the legend `name` of the page."""
    one = Picture(f"{name}-{series}", "", size=(26.0, 10.0), margins=(0, 0, 0, 0))
    one.axes.remove()
    style: Any = look(series) | {"markevery": [1]}
    one.figure.add_artist(Line2D([0.04, 0.5, 0.96], [0.5, 0.5, 0.5], **style))
    drawn = re.sub(r"<title.*?</desc>", "", one.svg())
    return re.sub(r"<svg .*?>", '<svg viewBox="0 0 26 10" width="35" height="13" aria-hidden="true">', drawn, count=1)
