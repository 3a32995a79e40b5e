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
def test_an_error_with_a_file_is_one_line(number, file, line, command):
    assert command(failing(OSError(number, os.strerror(number), file))) == (1, "", f"error: {line}\n")


def test_an_error_without_a_file_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(OSError, match="Input/output"):
        cli.run(failing(OSError(errno.EIO, os.strerror(errno.EIO))))


def test_a_picture_that_cannot_be_written_is_one_line(tiny_shards: Path, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    arguments = ("show", tiny_shards, "--images", 2, "--resolution", 32, "--out")
    line = "error: missing/x.png: No such file or directory; check the path\n"
    assert command(shards_command.main, *arguments, "missing/x.png") == (1, "", line)
    code, _, err = command(shards_command.main, *arguments, ".")
    assert code == 2 and "'.' is a directory" in err


def test_a_folder_below_a_file_is_one_line(tmp_path, command):
    (tmp_path / "file").write_text("")
    code, _, err = command(synthetic.main, "--out", tmp_path / "file" / "x", "--images", 40)
    assert code == 1 and err.startswith(f"error: {tmp_path / 'file' / 'x'}: ") and "file is a file" in err
    assert err.count("\n") == 1
