"""The report as one HTML page: no script, no network, light and dark, wide and narrow."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from train.study.report.charts import Figure, Table
from train.study.report.svg import legend, legend_below

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing but what is in it."""


def style() -> str:
    """The style sheet of the page and of its charts, without line breaks."""
    lines = files("train.study.report").joinpath("report.css").read_text(encoding="utf-8").splitlines()
    return "".join(line.strip() for line in lines)


def page(
    title: str,
    lead: str,
    warnings: Sequence[str],
    findings: Sequence[tuple[str, Sequence[str]]],
    sections: Sequence[str],
) -> str:
    """The whole page. title, lead, warnings and findings are plain text; sections are HTML (see `section`)."""
    told = "".join(
        f"<dt>{escape(question)}</dt><dd>{''.join(f'<p>{escape(line)}</p>' for line in answer)}</dd>"
        for question, answer in findings
    )
    alarms = "".join(f'<p class="warn">{escape(text)}</p>' for text in warnings)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style()}</style></head><body>\n'
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{alarms}</header>\n'
        f'<main>\n<nav aria-label="Sections">{_links(sections)}</nav>\n'
        f'<dl class="findings">{told}</dl>\n{"".join(sections)}</main></body></html>\n'
    )


def _links(sections: Sequence[str]) -> str:
    links = []
    for html in sections:
        name = html.split('id="', 1)[1].split('"', 1)[0]
        heading = html.split("<h2>", 1)[1].split("</h2>", 1)[0]
        links.append(f'<a href="#{name}">{heading}</a>')
    return "".join(links)


def section(name: str, heading: str, body: str) -> str:
    """One section: its name is unique in the page and of letters, digits and dashes; body is HTML."""
    return f'<section id="{name}"><h2>{escape(heading)}</h2>{body}</section>\n'


def figure(one: Figure) -> str:
    """A section with a picture, what it shows, and the numbers behind it."""
    kind = "one" if len(one.charts) == 1 else "small" if len(one.charts) > 2 else ""
    names = legend(one.legend) if one.legend else ""
    body = f'{names}<div class="charts {kind}">{"".join(one.charts)}</div>'
    body += f'<p class="caption">{escape(one.caption)}</p>'
    if one.table is not None:
        body += f"<details><summary>The numbers</summary>{table(one.table)}</details>"
    if one.more is not None:
        words = [i for i, head in enumerate(one.more.head) if head == "notes"]
        body += f"<details><summary>The fitted curves</summary>{table(one.more, text=words)}</details>"
    return section(f"section-{one.name}", one.title, body)


def table(one: Table, *, text: Sequence[int] = ()) -> str:
    """A table that scrolls sideways where it is too wide. text: columns of words, which may wrap."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if i in text else ''}{' scope=col' if tag == 'th' else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in one.rows)
    return (
        f'<div class="scroll"><table><thead><tr>{row(one.head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def settings(shared: Mapping[str, object], differing: Mapping[str, Sequence[object]]) -> str:
    """Names and values: what all runs share, and what differs between them."""
    rows = [[name, str(value)] for name, value in shared.items()]
    rows += [[name, ", ".join(str(v) for v in values)] for name, values in differing.items()]
    return table(Table(("what", "value"), rows), text=(0, 1))


def tiles(items: Sequence[tuple[str, str, str]], note: str) -> str:
    """Pictures with words: (data URL, alternative text, caption)."""
    pictures = "".join(
        f'<figure><img src="{url}" alt="{escape(alt, quote=True)}"><figcaption>{escape(words)}</figcaption></figure>'
        for url, alt, words in items
    )
    return f'<p class="warn">{escape(note)}</p><div class="tiles">{pictures}</div>'


def standalone(svg: str, names: Sequence[tuple[int, str]] = ()) -> str:
    """A chart as a file of its own, which follows the reader's light or dark setting.

    names: series and name of what its legend shows, below it.
    """
    root = svg.replace('<svg class="chart"', '<svg xmlns="http://www.w3.org/2000/svg" class="chart"', 1)
    head, rest = root.split(">", 1)
    width, height = head.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()
    if names:
        drawn, room = legend_below(names, float(width), float(height))
        head = head.replace(f'viewBox="0 0 {width} {height}"', f'viewBox="0 0 {width} {float(height) + room:g}"')
        height = f"{float(height) + room:g}"
        rest = rest.removesuffix("</svg>") + drawn + "</svg>"
    rules = style().replace(":root {", "svg {") + "svg .page { fill: var(--page); }"
    return (
        f'{head} width="{width}" height="{height}"><style>{rules}</style>'
        f'<rect class="page" width="{width}" height="{height}"/>{rest}\n'
    )
