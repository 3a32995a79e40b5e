"""Installed as users install it, commands work in a folder whose files have the names of the packages."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

from tests.test_architecture import MAY_IMPORT, ROOT

# Not `find_spec("pip")`: setuptools takes that for a start of pip, and hides its distutils from the whole process.
PIP, SETUPTOOLS = ([one.version for one in metadata.distributions(name=name)] for name in ("pip", "setuptools"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PIP, reason="needs pip"),
    pytest.mark.skipif(not SETUPTOOLS or int(SETUPTOOLS[0].partition(".")[0]) < 77, reason="needs setuptools 77"),
]

PACKED = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "dermscale.py", "tests", *MAY_IMPORT)


def execute(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that knows nothing of this checkout; it must succeed."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    known["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    words = [os.fsencode(word) if isinstance(word, Path) else str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=known, capture_output=True, text=True, errors="surrogateescape", check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def sources(folder: Path) -> Path:
    """A copy of what is built, without anything that is built already."""
    folder.mkdir()
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def environment(folder: Path) -> Path:
    """The `bin` of a new virtual environment that also sees the libraries of this one, torch among them."""
    venv.create(folder)
    inside = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(inside, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def install(bin_: Path, *what: object) -> None:
    """Install without dependencies; an installation in the environment of the libraries is left alone."""
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed")
    execute(bin_ / "python", "-m", "pip", "install", *options, *what, cwd=bin_)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    made = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", made)
    execute(*command, sources(made / "source"), cwd=made)
    [file] = made.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The `bin` of an environment with the wheel."""
    bin_ = environment(wheel.parent / "environment")
    install(bin_, wheel)
    return bin_


@pytest.fixture
def confusing(tmp_path: Path) -> Path:
    """A folder with data in `shards`, a folder `train`, and a file `train.py`."""
    for name in ("shards", "train"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.py").write_text("raise SystemExit('this is not the package')\n")
    return tmp_path


def test_the_wheel_holds_all_that_runs_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = {Path(name).name: archive.read(name).decode() for name in names if ".dist-info/" in name}
    packed = {name for name in names if ".dist-info/" not in name}
    python = {str(file.relative_to(ROOT)) for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")}
    library = {name for name in packed if name.startswith("shards/kernels/_kernels.") and name.endswith(".so")}
    maps = {str(file.relative_to(ROOT)) for file in (ROOT / "shards" / "maps").iterdir()}
    sets = {str(file.relative_to(ROOT)) for file in (ROOT / "preprocess" / "sets").glob("*.toml")}
    others = {"dermscale.py", "shards/FORMAT.md", "train/study/report/report.css"}
    assert packed == python | others | maps | sets | library
    assert len(library) == len(list((ROOT / "shards" / "kernels").glob("_kernels.*.so")))
    assert "dermscale = dermscale:main" in about["entry_points.txt"]
    assert {"LICENSE", "NOTICE"} <= set(about)
    assert Parser().parsestr(about["METADATA"])["Name"] == "dermscale"


def test_a_study_where_files_have_the_names_of_packages(installed: Path, confusing: Path) -> None:
    """By `dermscale`, whose path on the disk is no UTF-8 either: the processes of a grid import the packages too."""
    at = confusing.rename(Path(os.fsdecode(os.fsencode(confusing.parent) + b"/caf\xe9")))
    run = at / "study" / "cells" / "test_resnet_f1_s0_u0"
    program = installed / "dermscale"
    small = ("--epochs", 1, "--batch-size", 8, "--resolution", 32, "--compile", "off", "--device", "cpu")
    execute(program, "synthetic", "--out", "raw", "--images", 60, cwd=at)
    execute(program, "shard", "--source", "raw", "--out", at / "shards", "--max-resolution", 64, cwd=at)
    assert "60 samples are whole" in execute(program, "verify", "shards", cwd=at).stdout
    options = ("--models", "test_resnet", "--fractions", 1, "--seeds", 0, *small)
    execute(program, "grid", "--data", at / "shards", "--out", at / "study", *options, cwd=at)
    execute(program, "report", at / "study", "--tiles", 2, cwd=at)
    [image, *_] = sorted((at / "raw" / "HAM10000_images_part_1").iterdir())
    predicted = execute(program, "predict", "--run", run, image, cwd=at)
    assert predicted.stdout.startswith(f"{image}  ")


def test_modules_where_data_have_the_name_of_a_package(installed: Path, confusing: Path) -> None:
    (confusing / "train.py").unlink()
    for module in ("preprocess.shard", "shards", "train.grid"):
        assert "Usage: " in execute(installed / "python", "-m", module, "--help", cwd=confusing).stdout


def test_an_editable_install_where_data_have_the_name_of_a_package(tmp_path: Path, confusing: Path) -> None:
    bin_ = environment(tmp_path / "environment")
    source = sources(tmp_path / "source")
    install(bin_, "--editable", source)
    assert "Usage: " in execute(bin_ / "python", "-m", "preprocess.shard", "--help", cwd=confusing).stdout
    found = execute(
        bin_ / "python", "-c", "import shards; print(shards.ShardSet.__module__, shards.__file__)", cwd=confusing
    )
    assert found.stdout == f"shards.shardset {source}/shards/__init__.py\n"
    assert "Usage: dermscale run " in execute(bin_ / "dermscale", "run", "--help", cwd=confusing).stdout
