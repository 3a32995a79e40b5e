"""`make install` with a Python that only writes down what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
PYTHON = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip"; fi
"""


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def asked(python: Path) -> list[str]:
    """What a Python was started with, checks of its version left out."""
    file = python.with_name("asked")
    return [line for line in file.read_text().splitlines() if line.startswith("-m")] if file.exists() else []


def test_a_full_disk_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    python = executable(tmp_path / "system" / "python3")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    df = tmp_path / "tools" / "df"
    df.parent.mkdir()
    df.write_text(
        '#!/bin/sh\necho "$@" > "$ASKED"\n'
        "echo Filesystem 1024-blocks Used Available\necho /dev/disk 9999999 0 $FREE_KIB\n"
    )
    df.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "VENV")}
    environment["ASKED"] = str(tmp_path / "df-asked")
    environment["PATH"] = f"{df.parent}{os.pathsep}{environment['PATH']}"

    def install(free_kib: int, *options: str) -> subprocess.CompletedProcess:
        command = ["make", "install", f"PYTHON={python}", *options]
        known = environment | {"FREE_KIB": str(free_kib)}
        return subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)

    failed = install(3 * 2**20)
    assert failed.returncode == 2
    assert ".venv needs 8 GiB and its disk has 3.0 GiB left" in failed.stderr.splitlines()[0]
    assert (tmp_path / "df-asked").read_text() == f"-Pk {tmp_path}\n"
    other = tmp_path / "other"
    other.mkdir()
    install(3 * 2**20, f"VENV={other}/new/venv")
    assert (tmp_path / "df-asked").read_text() == f"-Pk {other}\n"
    assert asked(python) == []
    assert "left" not in install(9 * 2**20).stderr
    assert asked(python) == ["-m venv .venv"]


@pytest.mark.parametrize("bare", [True, False])
def test_continuous_integration_installs_what_a_bare_debian_lacks(tmp_path: Path, bare: bool) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    tools = tmp_path / "tools"
    tools.mkdir()
    if not bare:
        (tmp_path / "Python.h").touch()
    said = {
        "python3": f'[ "$2" = "import ensurepip" ] && exit {int(bare)}; echo {tmp_path}',
        "apt-get": f'echo "$@" >> {tmp_path}/asked',
        "id": "echo 0",
    } | dict.fromkeys(("make", "c++", "chromium"), "")
    for name, script in said.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HAM10000_SAMPLE": "x"}
    subprocess.run(["bash", tmp_path / ".ci" / "run"], env=environment, check=True)
    asked = (tmp_path / "asked").read_text() if bare else ""
    assert asked.endswith("python3-venv python3-dev\n" if bare else "")
    assert bare == (tmp_path / "asked").exists()


@pytest.mark.parametrize("there", [[], ["python"], ["python", "pip"]], ids=["nothing", "no pip", "a whole venv"])
def test_a_venv_is_made_where_there_is_none_with_pip_and_its_progress_is_shown(
    tmp_path: Path, there: list[str]
) -> None:
    python = executable(tmp_path / "system" / "python3")
    (tmp_path / "shards" / "kernels").mkdir(parents=True)
    sources = [str(file.relative_to(ROOT)) for file in (ROOT / "shards" / "kernels").glob("*.[ch]")]
    for name in ("Makefile", "pyproject.toml", "constraints.txt", *sources):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in there:
        executable(tmp_path / ".venv" / "bin" / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "VENV")}
    for _ in range(2):  # the second time nothing is left to do
        subprocess.run(["make", "install", f"PYTHON={python}"], cwd=tmp_path, env=environment, check=True)
        assert asked(python) == ([] if "pip" in there else ["-m venv .venv"])
        [install] = asked(tmp_path / ".venv" / "bin" / "python")
        assert install.startswith("-m pip install") and install.endswith(
            "--constraint constraints.txt --editable .[dev]"
        )
        assert "--quiet" not in install
