"""What the system says of a file becomes one line on every command line; what names no file stays a traceback."""

import errno
import os
import sys
from pathlib import Path

import click
import pytest

from preprocess import synthetic
from shards import __main__ as shards_command
from shards.common import cli


def ended(command: click.Command, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """Runs a command as `__main__` does; its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.run(command)
    return stop.value.code


def failing(error: OSError) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("number", "file", "line"),
    [
        (errno.ENOENT, "a/b", "a/b: No such file or directory; check the path"),
        (errno.ENOTDIR, b"a/b", "a/b: Not a directory; check the path"),
        (errno.ELOOP, "a/b", "a/b: Too many levels of symbolic links; check the path"),
        (errno.EIO, "a\nb", "a b: Input/output error"),
        (errno.EIO, 7, "7: Input/output error"),
        (errno.EROFS, "a", "a: Read-only file system; check the permissions or choose another folder"),
        (errno.ENOSPC, b"a", "the disk is full while writing a: free some space and start again"),
        (errno.ENOSPC, None, "the disk is full: free some space and start again"),
    ],
)
def test_an_error_with_a_file_is_one_line(number, file, line, monkeypatch, capsys):
    assert ended(failing(OSError(number, os.strerror(number), file)), monkeypatch) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_an_error_without_a_file_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(OSError, match="Input/output"):
        cli.run(failing(OSError(errno.EIO, os.strerror(errno.EIO))))


def test_a_picture_that_cannot_be_written_is_one_line(tiny_shards: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("show", tiny_shards, "--images", 2, "--resolution", 32, "--out")
    assert ended(shards_command.main, monkeypatch, *arguments, "missing/x.png") == 1
    assert capsys.readouterr().err == "error: missing/x.png: No such file or directory; check the path\n"
    assert ended(shards_command.main, monkeypatch, *arguments, ".") == 2
    assert "'.' is a directory" in capsys.readouterr().err


def test_a_folder_below_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert ended(synthetic.main, monkeypatch, "--out", tmp_path / "file" / "x", "--images", 40) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {tmp_path / 'file' / 'x'}: ") and "file is a file" in errors
    assert errors.count("\n") == 1
