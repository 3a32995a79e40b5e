"""Errors that the user can fix: exceptions whose text is the one line that the user sees. And errors as text."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Among them the escape character, with which a text could change a terminal."""


class DermscaleError(Exception):
    """Base of every error that the user can fix. Its text says what, where, the limit and what to do."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, even where it quotes a file, an option or another program."""
        return _CONTROL.sub(" ", super().__str__())


class DataError(DermscaleError):
    """Wrong, damaged or missing data: exit code 1."""


class UsageError(DermscaleError):
    """A wrong value of an option or argument: exit code 2."""

    exit_code = 2


def one_line(error: BaseException | str, most: int | None = None) -> str:
    """The text of an error on one line, at most `most` characters; the type of an exception that has no text."""
    text = " ".join(_CONTROL.sub(" ", str(error)).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def last_line(output: str) -> str:
    """The last line that a child process wrote to standard error: it says why the process ended."""
    return (output.strip().splitlines() or ["no message"])[-1]
