"""How every command of this project starts and ends: no traceback for an error that the user can fix.

Kept free of heavy imports, so that `--help` of any entry answers at once.
"""

import errno
import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from shards.common.errors import DermscaleError, one_line

_HINTS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; check the permissions or choose another folder"),
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), "; check the path"
    ),
}
"""What the user can do about a file error of the system, by its number."""


@contextmanager
def importing() -> Iterator[None]:
    """Switch Python's garbage collector off during imports.

    Imported objects stay, and looking at them again and again took a fifth of the import time of torch and Gradio.
    Afterwards later collections leave them out too.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def _file_of(error: OSError) -> str:
    """The file that an error names: libraries give text, bytes, or the number of an open file."""
    name = error.filename
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def system_error(error: OSError) -> str:
    """What the system could not do and what helps, in one line; empty if that is not known: no file is named."""
    where = f" while writing {_file_of(error)}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return one_line(f"the disk is full{where}: free some space and start again")
    if error.errno == errno.EFBIG:
        return one_line(f"a file became too large{where}: raise the limit (`ulimit -f`), or choose another disk")
    if error.filename:
        return one_line(f"{_file_of(error)}: {error.strerror}{_HINTS.get(error.errno or 0, '')}")
    if "temporary directory" in str(error.strerror):  # Python's, which names no file
        return one_line(f"{error.strerror}; set TMPDIR to a folder that can be written")
    return ""


def fail(message: str, code: int) -> None:
    """Print `error: message` on standard error and exit with `code`."""
    sys.stdout.flush()
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


class Command(click.Command):
    """A command that refuses an option which is given twice or with an empty value, such as an unset shell variable.

    click would use the last value in silence, and take an empty path for the current folder. Options for several values
    may be repeated, and so may flags that can only be switched on.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of the command line. Raises click.UsageError."""
        values, _, given = ({}, [], []) if ctx.resilient_parsing else self.make_parser(ctx).parse_args(list(args))
        for option in self.params:
            if not isinstance(option, click.Option):
                continue
            value, times = values.get(option.name), given.count(option)
            if value == "" or (option.multiple and "" in (value or ())):
                raise click.UsageError(f"{option.opts[0]} has an empty value: name one, or leave the option out", ctx)
            if times < 2 or option.multiple:
                continue
            if not option.is_flag or option.secondary_opts:
                name = "/".join((*option.opts, *option.secondary_opts))
                raise click.UsageError(f"{name} is given {times} times: give it once", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def _names() -> dict[str, str]:
    """What the user types for a module if `dermscale` started this process; otherwise nothing."""
    context = click.get_current_context(silent=True)
    return (context.find_object(dict) if context else None) or {}


def typed(module: str) -> str:
    """How the user starts a module, for messages: `dermscale shard`, or `python -m preprocess.shard` without it."""
    return _names().get(module, f"python -m {module}")


def typed_line(module: str) -> list[str]:
    """The words that the user typed to start this process, whose module is `module`."""
    return [*(["dermscale"] if _names() else ["python", "-m", module]), *sys.argv[1:]]


def run(command: click.Command) -> None:
    """Run a click command; a known error ends in one line.

    Exit codes: 2 wrong usage, 1 wrong data, a full disk or a file that cannot be used, 130 Ctrl-C; 143 SIGTERM, 129
    SIGHUP and 138 SIGUSR1 (set by the command itself).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path that is not UTF-8 is shown with its own bytes
            stream.reconfigure(errors="surrogateescape")
    try:
        code = command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        fail("interrupted", 130)
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # from click 8.2 on
            error.show()  # a group without a command: its whole help
            sys.exit(error.exit_code)
        fail(one_line(click.ClickException(error.format_message())), error.exit_code)
    except DermscaleError as error:
        fail(one_line(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        if line := system_error(error):
            fail(line, 1)
        raise
    else:
        sys.exit(code if isinstance(code, int) else 0)
