"""How every command line of this project starts and ends: no traceback for what the user can mend.

Kept free of heavy imports, so that `--help` of any entry answers at once.
"""

import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from shards.errors import DermscaleError


@contextmanager
def importing() -> Iterator[None]:
    """Imports without Python's garbage collector.

    What they make stays, and going through it again and again took a fifth of the time that torch and Gradio need to
    be imported. Afterwards all of it is left out of later collections.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def one_line(error: BaseException) -> str:
    """The text of an error on one line."""
    return " ".join(str(error).split())


def fail(message: str, code: int) -> None:
    """Print `error: message` on standard error and leave with `code`."""
    sys.stdout.flush()
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def run(command: click.Command) -> None:
    """Run a click command; end known failures in one line.

    Exit codes: 2 wrong usage, 1 wrong data or a full disk, 130 Ctrl-C, 143 SIGTERM (set by the command itself).
    """
    try:
        code = command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        fail("interrupted", 130)
    except click.ClickException as error:
        fail(one_line(click.ClickException(error.format_message())), error.exit_code)
    except DermscaleError as error:
        fail(one_line(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            fail(f"the disk is full{where}: free some space and start again", 1)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            fail(f"{error.filename}: {error.strerror}; check the permissions or choose another folder", 1)
        raise
    else:
        sys.exit(code if isinstance(code, int) else 0)
