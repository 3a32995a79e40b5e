"""The pages of the documentation: links lead somewhere, named tests exist, and the README's example runs."""

import ast
import csv
import json
import re
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "shards" / "FORMAT.md"])
FEATURES = ROOT / "docs" / "features.md"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """The fragments of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, fragment = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not fragment or fragment in anchors(target), f"{page.name} links to {link}"


@each_page
def test_every_file_that_a_page_names_exists(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("names files that are gone")
    for name in re.findall(
        r"`((?:shards|preprocess|train|benchmarks|examples|tests|docs)/[\w/.-]+\.\w+)", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_table_of_the_study_agrees_with_its_records():
    """The page's means with results.csv, and that with the results that each run has written."""
    scores: dict[str, dict[float, list[float]]] = {}
    with tarfile.open(ROOT / "docs/study/records.tar.xz") as records:
        for row in csv.DictReader((ROOT / "docs/study/results.csv").open()):
            file = records.extractfile(f"cells/{row['cell']}/result.json")
            assert file is not None
            test = json.load(file)["test"]
            for metric in ("balanced_accuracy", "macro_auc"):
                assert float(row[metric]) == pytest.approx(test[metric]["value"])
            of_model = scores.setdefault(row["model"], {})
            of_model.setdefault(float(row["fraction"]), []).append(test["balanced_accuracy"]["value"])
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    table = re.search(r"^\| training images \|(?: \w+ \|){8}\n[|-]+\n(?:\| [\d,]+ \|.*\n)+", page, flags=re.M)
    assert table is not None
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines())
    for model, *cells in list(zip(head, *lines, strict=True))[1:]:
        assert cells == [f"{sum(found) / len(found):.3f}" for _, found in sorted(scores[model].items())]


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|") and "](" not in line]


def test_the_readmes_example_runs(tiny_shards):
    """The code block of the README, on a small set and a CPU."""
    code = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert code is not None
    small = {
        "data/shards": str(tiny_shards),
        "batch_size=256": "batch_size=8",
        '"cuda"': '"cpu"',
        "range(30)": "range(2)",
    }
    text = code[1]
    for written, used in small.items():
        assert written in text
        text = text.replace(written, used)
    names: dict = {}
    exec(text, names)
    assert names["batch"].images.shape == (8, 3, 224, 224)
    assert names["state"]["epoch"] == 2 and names["state"]["batch"] == 0


@each_page
def test_every_test_that_a_page_names_exists(page):
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8"))
    if page == FEATURES:
        assert len(named) >= 10
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{page.name} names {file}::{name}"


def test_the_table_is_whole_and_every_link_has_its_address():
    text = FEATURES.read_text(encoding="utf-8")
    rows = [line.strip("|\n ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, body = rows[0], rows[1:]
    assert [row[0] for row in body] == [
        "random access",
        "mid-epoch resume in O(1)",
        "world size may change",
        "deterministic augmentation",
        "checksums",
        "decode at crop",
        "mixed raw/JPEG",
        "readable with plain tar",
        "metadata index",
        "fractions without repacking",
    ]
    assert all(len(row) == len(header) + 1 for row in body)  # the header's first cell is empty and was stripped
    for row in body:
        assert "tests/" in row[1]
        assert all("][" in cell or cell.startswith("not documented") for cell in row[2:])
    used = set(re.findall(r"\]\[([\w-]+)\]", text))
    given = re.findall(r"^\[([\w-]+)\]: https://\S+$", text, flags=re.M)
    assert used == set(given) and len(given) == len(set(given))
