"""What was measured on which GPU: the tables of docs/gpu.md are those of the committed files."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.evidence import FOLDER, NOTHING, PAGE, Evidence, main, read_evidence, renewed, tables
from benchmarks.gpu_check import result
from shards.common.errors import DataError

ROOT = Path(__file__).parents[2]


def written(folder, name, **changes):
    """An evidence file of a GPU that does not exist."""
    training = {"img_per_s": 1234.5, "cached_img_per_s": 2000.0, "data_wait_share": 0.25}
    training |= {"utilization": {"sm_percent": {"mean": 41.26}, "busy_percent": {"mean": 99.0}}}
    content = {
        "format": 1,
        "device": "cuda",
        "counts_as_gpu_evidence": True,
        "name": f"Made-up {name}",
        "environment": {
            "gpu_driver": "1.2",
            "versions": "torch 2.9; numpy 2.0; nvidia-dali-cuda120 2.4",
            "date": "2030-01-02T03:04:05+00:00",
            "commit": "abc",
            "cores": 8,
        },
        "settings": {"batch_size": 64, "resolution": 224},
        "finished": True,
        "checks": [
            {"name": "choice of auto (jpg)", "result": "pass", "numbers": {"engine": "dali"}},
            {"name": "parity of dali region (jpg, training)", "result": "fail", "numbers": {}},
            {"name": "training of resnet50", "result": "pass", "numbers": training},
            {"name": "training of vit_b16", "result": "fail", "numbers": {}},
        ],
    } | changes
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_page_says_what_the_evidence_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = PAGE.read_text(encoding="utf-8")
    assert page == renewed(page, tables(FOLDER), "docs/gpu.md"), (
        "write it again: `python -m benchmarks.evidence --write docs/gpu.md`"
    )
    links = re.findall(r"\[[^]]*\.json\]\(([^)]*)\)", page)
    assert len(links) == len(list(FOLDER.glob("*.json"))) and all((PAGE.parent / link).exists() for link in links)


def test_the_home_folder_is_not_in_what_is_committed(tmp_path):
    evidence = Evidence(tmp_path / "e.json", {"name": "a GPU"}, lambda line: None)
    numbers = {"reason": f"kept in {Path.home()}/.cache/x.json", "all": [float("nan")]}
    evidence.keep("engines", result("choice", "pass", numbers))
    assert json.loads(evidence.out.read_text())["checks"][0]["numbers"] == {
        "reason": "kept in ~/.cache/x.json",
        "all": ["nan"],
    }
    for path in (ROOT / FOLDER).glob("*.json"):
        assert read_evidence(path)
        assert not re.search(r"/(root|home)/", path.read_text())


def test_no_files_are_said_to_be_none(tmp_path):
    assert tables(tmp_path) == tables(tmp_path / "absent") == NOTHING


def test_every_gpu_and_every_failure_is_in_the_table(tmp_path):
    written(tmp_path, "a")
    written(tmp_path, "b", finished=False, checks=[])
    text = tables(tmp_path)
    assert "Made-up a" in text and "2 of 4 passed" in text and "parity of dali region (jpg, training)" in text
    assert "torch 2.9, nvidia-dali-cuda120 2.4" in text and "numpy" not in text
    assert "0 of 0 passed, unfinished" in text and "not found out" in text
    assert "8 cores, batches of 64 at 224 px" in text and "99" not in text
    assert "| resnet50 | 1,234 | 2,000 | 25.0 % | 41.3 % |  |  |  |  |" in text
    assert "| vit_b16 | failed |  |  |  |  |  |  |  |" in text


def test_speeds_are_shown_beside_that_of_one_cached_batch(tmp_path):
    def speed(source, img_per_s, style="eager", busy=None):
        numbers = {"model": "resnet18", "style": style, "source": source, "img_per_s": img_per_s}
        numbers |= {"main_cpu_share": 0.5, "switches_per_step": 2.25, "kernel_share": 0.4, "gpu_busy": busy}
        return result(source, "pass", numbers)

    found = [speed("cached", 4000.0), speed("dali", 3000.0, busy=0.31), speed("resident", 5000.0, style="graphed")]
    written(tmp_path, "a", checks=[*found, result("native", "fail", error="it broke")])
    text = tables(tmp_path)
    assert "3 of 4 passed" in text and "Training on Made-up a, batches of 64 at 224 px from each source" in text
    assert "| resnet18 | eager | cached | 4,000 | 100.0 % | 40.0 % |  | 50.0 % | 2.25 |" in text
    assert "| resnet18 | eager | dali | 3,000 | 75.0 % | 40.0 % | 31.0 % | 50.0 % | 2.25 |" in text
    assert "| resnet18 | graphed | resident | 5,000 |  | 40.0 % |  | 50.0 % | 2.25 |" in text
    assert "cached batch, which is the most" not in text  # the table of earlier checks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts_as_gpu_evidence": False}, "made on a CPU"),
        ({"device": "cpu"}, "made on a CPU"),
        ({"format": 2}, "format 2"),
        (None, r"x\.json: not an evidence file"),
    ],
)
def test_what_is_no_evidence_of_a_gpu_is_refused(tmp_path, changes, words):
    if changes is None:
        (tmp_path / "x.json").write_text("{")
    else:
        written(tmp_path, "x", **changes)
    with pytest.raises(DataError, match=words):
        tables(tmp_path)


def test_a_page_is_renewed_between_its_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- gpu evidence -->\nold\n<!-- /gpu evidence -->\n\nafter\n")
    folder = tmp_path / "gpu"
    folder.mkdir()
    for name in (None, "a"):
        if name:
            written(folder, name)
        for _ in range(2):  # a second time changes nothing
            done = CliRunner().invoke(main, ["--write", str(page), "--folder", str(folder)])
            assert done.exit_code == 0, done.output
            expected = f"before\n\n<!-- gpu evidence -->\n{tables(folder, page)}<!-- /gpu evidence -->\n\nafter\n"
            assert page.read_text() == expected
    with pytest.raises(DataError, match="0 marks"):
        renewed("nothing", "tables", "page.md")
