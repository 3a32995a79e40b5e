"""What the parts may know of each other, read from their imports; and that --help never waits."""

import ast
import graphlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "shards": set(),
    "preprocess": {"shards"},
    "train": {"shards"},
    "benchmarks": {"shards", "preprocess", "train"},
}
ENTRIES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in MAY_IMPORT
    for file in (ROOT / package).rglob("*.py")
    if '__name__ == "__main__"' in file.read_text()
)


def imports(file: Path, top_only: bool = False) -> set[str]:
    """The modules that a file imports; `top_only`, those it imports at import time."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.add(node.module or "")
    return found


def arrows() -> dict[str, set[str]]:
    """Each file of the packages, by its module's name, with the files that it imports, at import time or later.

    Imports for the type checker alone do not count: at run time they are not there.
    """
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("*.py")
    }

    def imported(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield whole if whole in files else str(child.module)
            yield from imported(child)

    return {name: set(imported(ast.parse(file.read_text()))) & set(files) - {name} for name, file in files.items()}


def folder_of(module: str) -> str:
    """The folder that a module's file lies in, as a package."""
    return module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert cycle(arrows()) == []


def test_no_packages_import_each_other_in_a_circle():
    folders: dict[str, set[str]] = {}
    for name, imported in arrows().items():
        home = folder_of(name)
        # A room inside a package is a part of it: `shards` and `shards.engines` may use each other's files.
        beside = {other for other in map(folder_of, imported) if not f"{home}.".startswith(f"{other}.")}
        folders.setdefault(home, set()).update(o for o in beside if not f"{o}.".startswith(f"{home}."))
    assert {"shards.common", "train.study.report"} <= set(folders)
    assert cycle(folders) == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_data_flows_one_way(package):
    for file in (ROOT / package).rglob("*.py"):
        others = {name.split(".")[0] for name in imports(file)} & set(MAY_IMPORT) - {package}
        assert others <= MAY_IMPORT[package], f"{file} imports {others}"


def test_the_command_stands_above_all_packages():
    assert {name for name in imports(ROOT / "dermscale.py") if name.split(".")[0] in MAY_IMPORT} == {
        "shards.common",
        "shards.common.errors",
    }
    files = [file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")]
    assert not [file for file in files if any(name.split(".")[0] == "dermscale" for name in imports(file))]


def test_dali_stands_in_one_file_of_the_library():
    files = [f for f in (ROOT / "shards").rglob("*.py") if any("nvidia.dali" in name for name in imports(f))]
    assert [f.name for f in files] == ["dali.py"]


def test_cuda_is_named_in_one_file_of_training():
    signs = ("torch.cuda", 'type == "cuda"', "convert_sync_batchnorm")
    files = [f.name for f in (ROOT / "train").rglob("*.py") if any(sign in f.read_text() for sign in signs)]
    assert set(files) <= {"device.py"}


def test_cuda_is_named_among_the_engines_and_the_machine_of_the_library_alone():
    files = [f for f in (ROOT / "shards").rglob("*.py") if "torch.cuda" in f.read_text()]
    assert {f.parent.name for f in files if f.name != "machine.py"} <= {"engines"}


def test_every_entry_is_known():
    assert {"shards", "preprocess.shard", "preprocess.synthetic", "preprocess.download", "train.run"} <= set(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_answers_at_once(entry):
    seconds = []
    for _ in range(5):  # processor time, the best of a few: a heavy import is there every time
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", entry, "--help"], capture_output=True, text=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and "Usage" in done.stdout and "--help" in done.stdout
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5
