"""What a user can have got wrong, as exceptions whose text is the one line that the user sees."""


class DermscaleError(Exception):
    """Base of every error that is the user's to mend. Its text says what, where, the limit and what to do."""

    exit_code = 1


class DataError(DermscaleError):
    """Wrong, damaged or missing data: exit code 1."""


class UsageError(DermscaleError):
    """A wrong value of an option or argument: exit code 2."""

    exit_code = 2
