"""What was found out about this machine, kept for later processes in $XDG_CACHE_HOME/dermscale (~/.cache/dermscale)."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def home() -> Path:
    """The folder of all that is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dermscale"


def file_of(subject: str, key: dict[str, Any]) -> Path:
    """Where the finding on a subject is kept. key: everything that it depends on, as JSON can hold it."""
    import xxhash

    return home() / f"{subject}-{xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())}.json"


def recall(subject: str, key: dict[str, Any], types: Mapping[str, type]) -> dict[str, Any] | None:
    """The finding that was kept; None if there is none that can be read. types: its fields with their types."""
    file = file_of(subject, key)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        found = {name: kept[name] for name in types}
        if kept["key"] != key or any(type(found[name]) is not kind for name, kind in types.items()):
            raise ValueError("other content")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s: not readable (%s), so it is found out again", file, error)
        return None
    return found


def keep(subject: str, key: dict[str, Any], finding: dict[str, Any]) -> None:
    """Keep a finding. If that fails, a warning says so and the next process finds it out again."""
    from shards.common.files import write_durably

    file = file_of(subject, key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, (json.dumps({"key": key, **finding}, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        _log.warning("%s: cannot be written (%s), so the next process finds it out again", file, error)
