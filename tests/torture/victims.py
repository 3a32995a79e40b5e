"""Not a test: commands that are killed with SIGKILL, at random moments or before chosen system calls."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import psutil

from tests.support.train_runs import child_environment
from tests.torture.conftest import FULL

CALLS = "fsync,fdatasync,rename,renameat2,unlink,unlinkat,ftruncate,mkdir,rmdir,link,write,pwrite64,flock"
"""Those that change files or wait for a disk or a lock."""
_LINE = re.compile(r"(\d+) +(\w+)\(")
_MEASURED = ("_s", "img_per_s", "data_wait_fraction", "peak_memory_bytes", "per_device")
"""What the names of columns of results.csv end with that a second study does not repeat."""
_ORPHAN = re.compile(r'Traceback .*\n  File "<string>", line 1, in <module>\n.* in spawn_main\n')
"""Python's own, of a process whose parent is killed while it starts it: none of our code has run there."""
_ENDS_S = 20.0
"""How long processes that have lost their parent may take to see it and end."""


class Victim:
    """One command, `python -m …`, that is started again and again."""

    def __init__(self, *command: object, seed: int = 0) -> None:
        """It is not started yet."""
        self.command = [sys.executable, "-m", *map(str, command)]
        self.draw = random.Random(seed)
        self.kinds: Counter[str] = Counter()
        """How often it or one of its processes was killed: by `time`, or the name of the system call."""
        self.calls: list[tuple[str, int]] = []
        self.seconds = 0.0
        self.killed = 0
        """How many processes `_run` has killed."""

    def whole(self) -> None:
        """Let it end, and check that it ends well."""
        code = self._run([])
        assert code == 0, f"{self.command} ended with {code}"

    def learn(self, out: Path) -> None:
        """Let it write the folder `out` twice: note how long it takes and, with strace, its calls in each thread."""
        started = time.monotonic()
        self.whole()
        self.seconds = time.monotonic() - started
        if not has_strace():
            return
        shutil.rmtree(out)
        log = out.with_name("strace")
        code = self._run(["strace", "-f", "-qq", "-e", f"trace={CALLS}", "-o", str(log)])
        assert code == 0, f"{self.command} ended with {code}"
        seen: Counter[tuple[str, str]] = Counter()
        for line in log.read_text(errors="replace").splitlines():
            if match := _LINE.match(line):
                seen[match[1], match[2]] += 1
                self.calls.append((match[2], seen[match[1], match[2]]))
        log.unlink()

    def kill(self) -> bool:
        """Start it and kill it, or one of its processes. False if it ended well: before that, or in spite of it."""
        # with --seccomp-bpf, strace 6.1 counts calls wrongly
        if self.calls and self.draw.random() < 0.5:
            kind = self.draw.choice(sorted({call for call, _ in self.calls}))  # there are far more writes than others
            number = self.draw.choice([number for call, number in self.calls if call == kind])
            inject = ["-e", f"trace={kind}", "-e", f"inject={kind}:signal=SIGKILL:when={number}"]
            with NamedTemporaryFile("r", errors="replace") as log:
                code = self._run(["strace", "-f", "-q", "-o", log.name, *inject])
                killed = "+++ killed by SIGKILL +++" in log.read()
        else:
            kind, before = "time", self.killed
            code = self._run([], self.draw.uniform(0.3, 1.0) * self.seconds)  # before, it imports
            killed = self.killed > before
        assert code in (0, 1, -signal.SIGKILL), f"{self.command} ended with {code}"
        assert killed or not code, f"{self.command} was not killed, and ended with {code}"
        self.kinds[kind] += killed
        return code != 0

    def _run(self, before: list[str], kill_after: float | None = None) -> int:
        """The exit code, when all processes of the command have ended."""
        with subprocess.Popen(
            [*before, *self.command],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            if kill_after is not None:
                try:
                    process.wait(kill_after)
                except subprocess.TimeoutExpired:
                    with suppress(psutil.NoSuchProcess):  # it has just ended
                        self.draw.choice([psutil.Process(process.pid), *children(process.pid)]).kill()
                        self.killed += 1
            _, errors = process.communicate(timeout=300)
            assert "Traceback" not in _ORPHAN.sub("", errors), errors
        deadline = time.monotonic() + _ENDS_S
        while left := [one for one in psutil.process_iter() if _session(one.pid) == process.pid]:
            assert time.monotonic() < deadline, f"{left} go on after {self.command}"
            time.sleep(0.05)
        return process.returncode


def children(pid: int) -> list[psutil.Process]:
    """All processes that a process has started, in the order of their numbers."""
    try:
        return sorted(psutil.Process(pid).children(recursive=True), key=lambda one: one.pid)
    except psutil.NoSuchProcess:
        return []


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder and of those in it, by their names."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def table(out: Path) -> dict[str, dict[str, str]]:
    """results.csv without what was measured of time and memory; each cell is there once."""
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len({row["cell"] for row in rows}) == len(rows)
    return {row["cell"]: {k: v for k, v in row.items() if not k.endswith(_MEASURED)} for row in rows}


def shared_memory() -> set[Path]:
    """What is in /dev/shm in a full run; in `make test`, other tests run beside this one and have some, so nothing.

    Without semaphores that glibc makes for joblib, which scikit-learn imports: joblib deletes each at once, and a kill
    before just that call leaves its 32 bytes.
    """
    found = set(Path("/dev/shm").iterdir()) if FULL in os.environ else set()
    return {file for file in found if not re.fullmatch(r"sem\.(joblib-\d+-\w+|\w{6})", file.name)}


def has_strace() -> bool:
    """Whether strace is there and may follow processes."""
    return (
        shutil.which("strace") is not None
        and not subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, check=False).returncode
    )
