"""Fixtures of the tests of `train`."""

import math

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process do not look for other programs on the cores, which tests may well meet."""
    monkeypatch.setattr("train.crowding.LOOK_S", math.inf)
