"""How often things are tried, and the record of what was tried. docs/reliability.md quotes the record."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

FULL = "DERMSCALE_TORTURE"
"""Names the file that the records of a full run are appended to. Without it, each thing is tried a few times."""


@pytest.fixture
def times() -> Callable[[int, int], int]:
    """How often to try: the first number for `make test`, the second for `make torture`."""
    return lambda few, many: many if FULL in os.environ else few


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Appends what a test has counted to the record of a full run."""

    def note(**counts: object) -> None:
        if file := os.environ.get(FULL):
            with Path(file).open("a") as lines:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                lines.write(json.dumps({"test": request.node.name, "time": now, **counts}) + "\n")

    return note
