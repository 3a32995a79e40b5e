"""The plan beside what was measured: committed figures are placed right; a GPU that the plan has not is left out."""

import json
from pathlib import Path

import pytest

from benchmarks import plan_costs
from benchmarks.plan import Span, gpu_rate
from benchmarks.plan_beside import RESULTS, _place, beside_measured

COSTS = plan_costs.read(plan_costs.DEFAULT)


@pytest.mark.parametrize(
    ("rate", "words"),
    [(50, "0.50 of the paper's least"), (100, "within"), (150, "within"), (200, "within"), (300, "1.50 times")],
)
def test_a_rate_is_placed_in_the_papers_range(rate, words):
    assert _place(rate, Span(100, 200)).startswith(words)


def test_the_committed_evidence_stands_beside_the_paper():
    text = beside_measured(COSTS)
    (path,) = (RESULTS / "gpu").glob("*h100*.json")
    checks = {check["name"]: check["numbers"] for check in json.loads(path.read_text())["checks"]}
    for model in ("alexnet", "vit_b16"):
        rate = checks[f"training of {model}"]["cached_img_per_s"]
        assert f"{rate:,.0f}, {_place(rate, gpu_rate('h100', model, 224))}" in text
    assert text.count("| within |") + text.count("of the paper's least |") >= 4
    for link in ("../benchmarks/results/gpu/" + path.name, "../benchmarks/results/h100/loader-quick.md"):
        assert f"({link})" in text and (RESULTS.parent.parent / "docs" / link).resolve().is_file()


def test_a_gpu_that_is_not_in_the_plan_and_no_evidence_give_no_section(tmp_path):
    assert beside_measured(COSTS, tmp_path) == ""
    (source,) = (RESULTS / "gpu").glob("*h100*.json")
    other = json.loads(source.read_text()) | {"name": "Another GPU"}
    (tmp_path / "gpu").mkdir()
    Path(tmp_path / "gpu" / "x.json").write_text(json.dumps(other))
    assert beside_measured(COSTS, tmp_path) == ""
    Path(tmp_path / "gpu" / "x.json").write_text(source.read_text())
    alone = beside_measured(COSTS, tmp_path)  # without a table of loaders
    assert "Training with one cached batch" in alone and "Loading" not in alone and "Python's lock" not in alone
    checks = {check["name"]: check["numbers"] for check in json.loads(source.read_text())["checks"]}
    eager, compiled = (checks[f"training of resnet18{how}"] for how in ("", " (compiled)"))
    cached, loaded = (compiled[key] / eager[key] for key in ("cached_img_per_s", "img_per_s"))
    assert f"resnet18 {cached:.1f} times as fast on a cached batch and {loaded:.1f} times with the loader" in alone
    failed = json.loads(source.read_text())
    for check in failed["checks"]:
        if check["name"] in ("training of alexnet", "training of resnet18 (compiled)"):
            check["numbers"] = {}
    Path(tmp_path / "gpu" / "x.json").write_text(json.dumps(failed))
    assert "CUDA graphs make resnet18" not in beside_measured(COSTS, tmp_path)
    Path(tmp_path / "gpu" / "x.json").write_text(source.read_text())
    (tmp_path / "h100").mkdir()
    table = (RESULTS / "h100" / "loader-quick.csv").read_text()
    (tmp_path / "h100" / "loader-quick.csv").write_text(table.replace("H100 80GB HBM3", "H100 PCIe"))
    assert beside_measured(COSTS, tmp_path) == alone  # another GPU's table
