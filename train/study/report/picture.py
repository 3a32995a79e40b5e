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

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

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
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2,
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


def plain(value: float) -> str:
    """Three digits: `0.85`."""
    return f"{round(value, 9) + 0.0:.3g}"  # no `-0`


# ------------------------------------------------------------------ a picture


class Picture:
    """One chart with two axes. What is drawn can be named for the page: a class, and words for the mouse.

    name: unique in a page, letters, digits and dashes. title: what is shown. size: width and height, points. wide: it
    has a row of the page for itself. said: sentences with the main numbers, for those who do not see the chart.
    """

    def __init__(
        self, name: str, title: str, *, size: tuple[float, float] = (330.0, 225.0), wide: bool = False
    ) -> None:
        self.name = re.sub(r"[^\w.-]", "_", name)  # a class may be called `A/B`, and this names a file
        self.title, self.size, self.wide = title, size, wide
        self.said: list[str] = []
        self.words: list[str] = []
        self.figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        self.axes = self.figure.add_subplot()

    @property
    def alt(self) -> str:
        """The chart in words."""
        return " ".join(self.said) or "Undefined."

    def mark(self, kind: str, words: str = "") -> str:
        """The gid of something drawn: its CSS class, and words shown when the mouse rests on it."""
        self.words.append(words)
        return f"{kind}~{len(self.words) - 1}"

    # ------------------------------------------------------------------ axes

    def linear(
        self,
        axis: str,
        low: float,
        high: float,
        label: Callable[[float], str],
        *,
        limits: tuple[float, float] | None = None,
    ) -> None:
        """A linear axis ("x" or "y") with a little room around low to high, within `limits`, with grid lines."""
        if not high > low:
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        room = 0.04 * (high - low)
        low, high = low - room, high + room
        if limits is not None:
            low, high = max(low, limits[0]), min(high, limits[1])
        (self.axes.set_xlim if axis == "x" else self.axes.set_ylim)(low, high)
        ticks = MaxNLocator(4 if self.size[1] < 200 else 5, steps=[1, 2, 2.5, 5, 10])
        self._ticks(self.axes.xaxis if axis == "x" else self.axes.yaxis, ticks, label)

    def logarithmic(self, low: float, high: float, label: Callable[[float], str] = short) -> None:
        """A logarithmic x axis from low to high with a little room."""
        room = max((high / low) ** 0.04, 1.06)
        self.axes.set_xscale("log")
        self.axes.set_xlim(low / room, high * room)
        ratio = high / low
        steps = (1, 2, 5) if ratio < 20 else (1, 3) if ratio < 1000 else (1,)
        ticks = MaxNLocator(3) if ratio < 4 else LogLocator(subs=steps)
        self.axes.xaxis.set_minor_locator(NullLocator())
        self._ticks(self.axes.xaxis, ticks, label)

    def _ticks(self, axis: Any, ticks: Locator, label: Callable[[float], str]) -> None:
        axis.set_major_locator(ticks)
        axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
        axis.grid(True, color=LIGHT["line"], linewidth=0.6, clip_on=False)

    def rows(self, names: Sequence[str]) -> None:
        """A y axis of named rows: 0 for the first, at the top."""
        self.axes.set_ylim(len(names) - 0.5, -0.5)
        self.axes.set_yticks(range(len(names)), names, color=LIGHT["ink"])

    def legend(self, names: Sequence[tuple[int, str]]) -> None:
        """A legend below the axes: series and name of each. The picture becomes higher by it."""
        width, height = self.size
        columns = max(1, min(len(names), int(width / (34 + LETTER * max(len(name) for _, name in names)))))
        self.size = width, height + 14.0 * -(-len(names) // columns)
        self.figure.set_size_inches(width / 72, self.size[1] / 72)
        handles = [Line2D([], [], label=name, **look(series)) for series, name in names]
        self.figure.legend(handles=handles, loc="outside lower center", ncols=columns)

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
        x, y = ([low, high], [at, at]) if across else ([at, at], [low, high])
        caps = {"marker": "|" if across else "_", "markersize": 5, "markeredgewidth": 1.0, "markeredgecolor": colour}
        self.axes.plot(x, y, gid=self.mark("bar"), color=colour, linewidth=1.0, clip_on=False, **caps)

    # ------------------------------------------------------------------ as text and files

    def svg(self) -> str:
        """The `<svg>` element for a page, its colours CSS variables of the names in LIGHT."""
        names = {value: name for name, value in LIGHT.items()}
        text = self._drawn(lambda tag: re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda m: f"var(--{names[m[0]]})", tag))
        most = f"{LARGEST * self.size[0] * 4 / 3:.0f}px"
        return text.replace(' role="img"', f' style="max-width:{most}" role="img"', 1)

    def files(self) -> dict[str, bytes]:
        """SVG, PDF and PNG (300 dpi) by suffix."""
        written = {"svg": self._standalone().encode()}
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            with styled():
                self.figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
            written[kind] = buffer.getvalue()
        return written

    def _standalone(self) -> str:
        dark = "".join(
            f'[style*="{part}: {LIGHT[name]}"]{{{part}:{DARK[name]}!important}}'
            for name in LIGHT for part in ("fill", "stroke")
        )  # fmt: skip
        rules = f"text{{font-family:{FONTS}}}*{{stroke-linejoin:round}}@media(prefers-color-scheme:dark){{{dark}}}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        head = f'<svg {spaces} width="{self.size[0]:g}pt" height="{self.size[1]:g}pt" '
        return self._drawn(str).replace("<svg ", head, 1).replace("</desc>", f"</desc><style>{rules}</style>", 1) + "\n"

    def _drawn(self, paint: Callable[[str], str]) -> str:
        """The SVG text, shortened, with its title, description and words. paint: changes the colours of a tag."""

        def tag(match: re.Match[str]) -> str:
            text = re.sub(r"\s+", " ", paint(match.group()))
            group = re.fullmatch(r'<g id="([^"]*)" ?(/?)>', text)
            if group:
                kind, _, number = group[1].partition("~")
                words = self.words[int(number)] if number else ""
                title = f"<title>{escape(words)}</title>" if words else ""
                return "" if group[2] else f'<g class="{kind}">{title}' if number else "<g>"
            text = re.sub(r"(\.\d\d)\d+", r"\1", text)
            return re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", text)

        buffer = io.StringIO()
        with styled(), matplotlib.rc_context({"svg.hashsalt": self.name}):  # names of markers are unique in a page
            self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        drawn = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", buffer.getvalue(), flags=re.S)
        drawn = drawn[drawn.index("<svg") :]
        drawn = re.sub(r"<[^>]+>", tag, drawn)
        drawn = re.sub(r">\s+<", "><", drawn)
        while "<g></g>" in drawn:
            drawn = drawn.replace("<g></g>", "")
        name, kind = self.name, "chart wide" if self.wide else "chart"
        return (
            f'<svg class="{kind}" id="{name}" viewBox="0 0 {self.size[0]:g} {self.size[1]:g}" role="img" '
            f'aria-labelledby="{name}-t {name}-d">'
            f'<title id="{name}-t">{escape(self.title)}</title><desc id="{name}-d">{escape(self.alt)}</desc>'
            f"{drawn[drawn.index('>') + 1 :].strip()}"
        )
