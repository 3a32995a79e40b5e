"""What the system says of a file becomes one line on every command line; what names no file stays a traceback."""

import ast
import errno
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import click
import pytest

import dermscale
from benchmarks import evidence
from preprocess import synthetic
from shards import __main__ as shards_command
from shards.common import cli


def failing(error: OSError) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


def test_no_folder_for_temporary_files_is_one_line(monkeypatch, command):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nothing"])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    code, _, errors = command(failing(caught.value))
    assert code == 1 and errors.count("\n") == 1 and "set TMPDIR to a folder that can be written" in errors


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


@click.command(cls=cli.Command)
@click.option("--run")
@click.option("--model", multiple=True)
@click.option("--on/--off", default=True)
@click.option("--json", is_flag=True)
@click.argument("images", nargs=-1)
def example(**given: object) -> None:
    click.echo(str(given))


def test_an_option_with_one_value_is_refused_the_second_time_and_if_it_is_empty(command):
    for words, name in (
        (("--run", "a", "--run", "b"), "--run is given 2 times: give it once"),
        (("--run=a", "x.jpg", "--run", "a", "--run", "c"), "--run is given 3 times: give it once"),
        (("--on", "--off"), "--on/--off is given 2 times: give it once"),
        (("--run", ""), "--run has an empty value: name one, or leave the option out"),
        (("--model=",), "--model has an empty value: name one, or leave the option out"),
        (("--model", "a", "--model", ""), "--model has an empty value: name one, or leave the option out"),
    ):
        assert command(example, *words) == (2, "", f"error: {name}\n")
    code, out, _ = command(example, "--model", "a", "--model", "b", "--json", "--json", "--run", "--run", "--off")
    assert code == 0
    expected = {"model": ("a", "b"), "json": True, "run": "--run", "on": False, "images": ()}
    assert ast.literal_eval(out) == expected


def test_every_command_refuses_a_second_value():
    seen = []

    def check(command: click.Command) -> None:
        if isinstance(command, click.Group):
            for one in command.commands.values():
                check(one)
            return
        assert isinstance(command, cli.Command), command.name
        seen.append(command)

    for entry in dermscale.COMMANDS.values():
        check(getattr(import_module(entry.module), entry.function))
    check(evidence.main)
    assert len(seen) > len(dermscale.COMMANDS)


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
