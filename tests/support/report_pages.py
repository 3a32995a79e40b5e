"""Not a test: a folder's report, its words, and what a real browser makes of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from train.study import analysis
from train.study import runs as study_data
from train.study.report.charts import charts
from train.study.report.findings import findings
from train.study.report.page import compose

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def analysed(path: Path) -> analysis.Analysis:
    return analysis.analyse(study_data.read(path), resamples=200)


def compose_folder(path: Path) -> tuple[analysis.Analysis, str]:
    one = analysed(path)
    return one, compose(one, charts(one))


def words(page: str) -> str:
    """The text of a page, without tags."""
    return re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)


def told(one: analysis.Analysis) -> str:
    return " ".join(sentence for _, answer in findings(one) for sentence in answer)


PROBE = """<script>
addEventListener('load', () => {
  const told = [];
  for (const svg of document.querySelectorAll('svg.chart')) {
    const box = svg.getBoundingClientRect(), marks = [...svg.querySelectorAll('.point,.line,.bar,.box,.heat')];
    const drawn = marks.filter(m => { const b = m.getBBox(); return b.width + b.height > 0; }).length;
    const view = svg.viewBox.baseVal, out = [];
    for (const text of svg.querySelectorAll('text')) {
      const b = text.getBoundingClientRect(), slack = 1.5;
      if (text.textContent && (b.left < box.left - slack || b.right > box.right + slack || b.top < box.top - slack ||
          b.bottom > box.bottom + slack)) out.push(text.textContent);
    }
    told.push({id: svg.id, width: box.width, height: box.height, marks: marks.length, drawn, out});
  }
  const images = [...document.images].map(i => i.naturalWidth);
  const body = getComputedStyle(document.body);
  const seen = JSON.stringify({told, images, scroll: document.scrollingElement.scrollWidth, inner: innerWidth,
    paper: body.backgroundColor, ink: body.color});
  document.body.setAttribute('data-probe', seen);
  parent.postMessage(seen, '*');
});
</script>"""

FRAME = """<!doctype html><body><script>
addEventListener('message', message => document.body.setAttribute('data-probe', message.data));
</script><iframe src="page.html" style="width: {}px; height: 800px; border: 0"></iframe></body>"""
"""A page around the page, which is then as narrow as on a phone: no window of Chromium is under 500 px wide."""


def browse(page: str, folder: Path, *, width: int = 1100, dark: bool = False) -> tuple[dict, str]:
    """What a headless Chromium made of a page, and what it logged. The probe is added to the copy that it loads."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no Chromium on PATH (looked for {', '.join(BROWSERS)})")
    copy = folder / "page.html"
    allowed = page.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    copy.write_text(allowed.replace("</body>", PROBE + "</body>"))
    if width < 500:
        copy = folder / "frame.html"
        copy.write_text(FRAME.format(width))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000"]
    command += ["--enable-logging=stderr", "--v=0", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=180)
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert probe, f"the page did not load: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(probe.group(1).replace("&quot;", '"').replace("&amp;", "&")), "\n".join(console)


def assert_drawn(seen: dict, console: str, charts: int) -> None:
    assert not console
    assert len(seen["told"]) == charts
    for chart in seen["told"]:
        assert chart["width"] > 150 and chart["height"] > 50, chart
        assert chart["marks"] and chart["drawn"] >= 0.7 * chart["marks"] > 0, chart
        assert not chart["out"], chart
    assert all(width > 0 for width in seen["images"])
