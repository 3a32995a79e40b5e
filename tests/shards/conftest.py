"""Fixtures of the tests of `shards`."""

import pytest

from shards import jpeg
from shards.engines import native, resample


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the native engine has the compiled library; without it, threads of Python do the work."""
    if not request.param:
        monkeypatch.setattr(native, "start_workers", lambda *_: None)
        for module in (resample, jpeg):
            monkeypatch.setattr(module, "compiled", lambda: None)
    return request.param
