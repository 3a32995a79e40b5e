"""The signals that ask a program to stop: Ctrl-C (SIGINT), SIGTERM, SIGHUP, and SIGUSR1.

SIGHUP comes when a terminal closes. Slurm sends the signal that `sbatch --signal` names, usually SIGUSR1, some time
before the time limit, and SIGTERM before it takes a node away. The exit code is 128 + the number of the signal.
"""

import os
import signal
from contextlib import suppress
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_STOPPING = b"stopping after this step, with a checkpoint; a second Ctrl-C ends at once, without one\n"


def asked_to_stop(second_ends: bool) -> list[int]:
    """Collect the signals that ask to stop, instead of ending, from now on; return the list of their numbers.

    second_ends: the first one is answered with a line on standard error, and the next one ends the process at once. A
    process that torchrun started leaves that to torchrun, which repeats the signal and kills after 30 s. Signals that
    are ignored already stay ignored: SIGHUP under `nohup`, SIGINT of a shell's background job.
    """
    numbers = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]  # one that is closed is not known as one any more
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGHUP:
            _silence(terminals)
        if second_ends and not launched:
            for one in numbers:
                signal.signal(one, signal.SIG_DFL)
            with suppress(OSError):  # a pipe that nobody reads
                os.write(2, b"\n" * (2 in terminals) + _STOPPING)

    for number in numbers:
        signal.signal(number, ask)
    return asked


def _silence(streams: list[int]) -> None:
    """Send what would be printed on terminals nowhere: each write to one that is closed fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)
