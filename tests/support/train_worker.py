"""Not a test: a process of a training job that kills itself if asked. Run by test_resume.py and test_distributed.py.

    python tests/support/train_worker.py '{"config": {…}, "out": "…", "kill_at": 3, "kill_rank": 1}'

It sends itself SIGKILL at the `kill_at`-th call of `stop`. A job that torchrun has restarted does not do it again.
"""

import json
import os
import signal
import sys
from pathlib import Path

from shards.common.errors import DermscaleError
from train.config import Config
from train.distributed import world
from train.loop import train_once


def main(order: dict) -> int:
    """Train as ordered; the exit code, with one line on standard error for a known failure."""
    asked = 0
    try:
        with world("cpu") as here:

            def stop() -> bool:
                nonlocal asked
                asked += 1
                doomed = here.rank == order.get("kill_rank", 0) and here.restart == 0
                if doomed and asked == order.get("kill_at"):
                    os.kill(os.getpid(), signal.SIGKILL)
                return False

            resume = order.get("resume", False) or here.restart > 0
            train_once(Config(**order["config"]), Path(order["out"]), resume=resume, world=here, stop=stop)
    except DermscaleError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
