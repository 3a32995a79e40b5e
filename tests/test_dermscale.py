"""The command `dermscale`: it has all commands, imports only the one that is called, and speaks of itself."""

import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

import dermscale
from benchmarks.options import command_line
from shards.common import cli
from tests.test_architecture import ENTRIES, ROOT

Command = Callable[..., tuple[int, str, str]]
SCRIPT = "import sys; sys.argv[0] = 'dermscale'; import dermscale; dermscale.main()"
"""What the installed script does."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command; the exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/bin/dermscale", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.run(dermscale.group)
        out, errors = capsys.readouterr()
        return int(stop.value.code or 0), out, errors

    return run


def started(arguments: list[str]) -> tuple[float, str]:
    """Processor time of a Python process, the best of a few, and what it prints: a heavy import is there every time."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] < 0.2:
            break
    return min(seconds), done.stdout


def body(text: str) -> str:
    """A help text without its first line, which names the program."""
    return text.partition("\n")[2]


def test_every_module_that_is_a_command_is_there():
    modules = {command.module.removesuffix(".__main__") for command in dermscale.COMMANDS.values()}
    assert modules == set(ENTRIES) - {"benchmarks.evidence"}  # which makes a page of this repository


def test_the_help_lists_the_commands_in_the_order_of_use_and_imports_none():
    modules = sorted({command.module.partition(".")[0] for command in dermscale.COMMANDS.values()} - {"shards"})
    listing = f"import atexit; atexit.register(lambda: print([m for m in {modules} if m in sys.modules])); {SCRIPT}"
    seconds, shown = started(["-c", f"import sys; {listing}", "--help"])
    assert seconds < 0.3
    assert shown.endswith("\n[]\n")
    places = [shown.index(f"\n  {name} ") for name in dermscale.COMMANDS]
    assert places == sorted(places)
    assert all(command.does in shown and command.does.endswith(".") for command in dermscale.COMMANDS.values())


@pytest.mark.parametrize("name", dermscale.COMMANDS)
def test_a_command_is_that_of_its_module(name):
    seconds, shown = started(["-c", SCRIPT, name, "--help"])
    assert seconds < 0.5
    assert shown.startswith(f"Usage: dermscale {name} ")
    module, _, function = dermscale.COMMANDS[name]
    _, same = started(["-m", module.removesuffix(".__main__"), *([] if function == "main" else [name]), "--help"])
    assert body(shown).split() == body(same).split()


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command, or those of a group, with their names."""
    if isinstance(command, click.Group):
        for sub, one in command.commands.items():
            yield from commands(one, f"{name} {sub}")
    else:
        yield name, command


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_option_says_what_it_does_in_whole_sentences(entry):
    module = importlib.import_module("shards.__main__" if entry == "shards" else entry)
    seen = 0
    for name, one in commands(module.main, entry):
        for option in one.params:
            if isinstance(option, click.Option):
                seen += 1
                said, _, rest = (option.help or "").partition("  [default: ")
                assert said.endswith(".") and len(said.split()) > 3, f"{name} {option.opts[0]}: {said}"
                assert not rest or rest.endswith("]")
                assert "{" not in said
    assert seen > 1


def test_no_command_and_a_wrong_one(command: Command):
    code, out, errors = command()
    assert (code, out) == (2, "")
    assert errors.startswith("Usage: ") and len(errors.splitlines()) > len(dermscale.COMMANDS)
    code, out, errors = command("pack", "--help")
    assert (code, out) == (2, "")
    assert errors == f"error: 'pack' is no command: use one of {', '.join(dermscale.COMMANDS)}\n"
    assert command("--pack") == (2, "", "error: No such option '--pack'.\n")


def test_messages_name_the_command_as_it_was_started(command: Command, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = (
        "error: data/ham10000: no such folder; get HAM10000 with `{}`, or write a synthetic set into it with `{} --out"
    )
    assert command("shard")[2].startswith(said.format("dermscale download", "dermscale synthetic"))
    assert f"with `dermscale shard --out {tmp_path}/x`" in command("run", "--model", "test_resnet", "--data", "x")[2]
    assert "with `dermscale grid --out x`" in command("report", "x")[2]
    from preprocess.shard import main

    monkeypatch.setattr(sys, "argv", ["preprocess/shard.py"])
    with pytest.raises(SystemExit):
        cli.run(main)
    alone = said.format("python -m preprocess.download", "python -m preprocess.synthetic")
    assert capsys.readouterr().err.startswith(alone)


def test_tables_of_benchmarks_keep_the_line_that_was_typed(command: Command, monkeypatch: pytest.MonkeyPatch):
    @click.command()
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def probe(words: tuple[str, ...]) -> None:
        click.echo(command_line("benchmarks.run"))

    monkeypatch.setitem(sys.modules, "probe", probe)
    monkeypatch.setattr(probe, "command", probe, raising=False)
    monkeypatch.setitem(dermscale.COMMANDS, "bench", dermscale.Command("probe", "Probe.", "command"))
    assert command("bench", "loader", "/a/b/data")[1] == "dermscale bench loader data\n"
    assert command_line("benchmarks.run").startswith("python -m benchmarks.run ")


def test_a_shell_completes_commands_without_importing_them_and_options():
    shell = BashComplete(dermscale.group, {}, "dermscale", "_DERMSCALE_COMPLETE")
    assert [item.value for item in shell.get_completions([], "")] == list(dermscale.COMMANDS)
    assert [(item.value, item.help) for item in shell.get_completions([], "re")] == [
        ("report", dermscale.COMMANDS["report"].does)
    ]
    assert "--fraction" in [item.value for item in shell.get_completions(["run"], "--fr")]
    assert [item.value for item in shell.get_completions(["pack"], "--")] == ["--help"]


def test_processes_that_a_command_starts_do_not_search_the_working_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that the end of the test undoes what the command sets
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setattr(sys, "argv", ["dermscale", "--help"])
    with pytest.raises(SystemExit):
        dermscale.main()
    assert os.environ["PYTHONSAFEPATH"] == "1"
