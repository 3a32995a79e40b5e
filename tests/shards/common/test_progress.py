"""The progress display: a bar on a terminal with lines above it, and lines now and then elsewhere."""

import errno
import io
from contextlib import nullcontext

import pytest

from shards.common import progress
from shards.common.progress import Progress


class Terminal(io.StringIO):
    """A text file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_is_printed_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with Progress("writing", 2_000, "images", done=500) as shown:
        shown.advance(1_000)
    with Progress("data.zip", 0, "bytes") as shown:
        shown.resize(4_000_000)
        shown.advance(1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "writing: 1,500 of 2,000 images, 75 %, 0 s"
    assert lines[-1] == "data.zip: 1 of 4 MB, 25 %, 0 s"


@pytest.mark.parametrize("options", [{}, {"lines": False}])
def test_a_short_job_prints_no_progress(capsys, options):
    with Progress("start", **options) as shown:
        for step in range(100):
            shown.at("epoch 1/2", step, 100)
        shown.say("epoch 1/2: loss 1.2")
        shown.warn("the batch is small")
    assert capsys.readouterr() == ("epoch 1/2: loss 1.2\n", "warning: the batch is small\n")


def test_on_a_terminal_phases_change_lines_stand_above_the_bar_and_the_end_is_drawn(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr(progress, "REDRAW_S", 1e6)  # only what must be drawn
    monkeypatch.setenv("TERM", "xterm")
    with Progress("start", lines=False) as shown:
        for step in range(1, 400):
            shown.at("epoch 1/2", step, 500)
        shown.say("epoch 1/2: loss 1.2")
        shown.at("test", 3, 8)
        shown.warn("the batch is small")
        shown.at("test", 6, 8)
    drawn = screen.getvalue()
    assert "epoch 1/2: loss 1.2\n" in drawn and "warning: the batch is small" in drawn
    last = drawn[drawn.rindex("warning: the batch is small") :]
    assert "test" in last and "75%" in last


@pytest.mark.parametrize(("number", "raised"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_a_terminal_that_was_closed_ends_no_job_and_a_full_disk_does(monkeypatch, number, raised):
    class Closed(Terminal):
        def write(self, text: str) -> int:
            raise OSError(number, "cannot be written")

    monkeypatch.setattr(progress, "LINE_S", 0.0)
    shown = Progress("writing", 10, "images")
    shown.__enter__()  # before it is closed
    monkeypatch.setattr("sys.stderr", Closed())
    monkeypatch.setattr("sys.stdout", Closed())
    for write in (lambda: shown.say("text"), lambda: shown.warn("text"), lambda: shown.advance(1)):
        with pytest.raises(OSError, match="cannot be written") if raised else nullcontext():
            write()
