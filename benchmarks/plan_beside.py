"""What the plan says on paper beside what was measured since, of the GPUs that results are committed of."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, read_evidence
from benchmarks.plan import HAM10000_IMAGES, Machine, Span, gpu_rate, ways
from benchmarks.plan_costs import Costs
from benchmarks.plan_words import digits, span
from benchmarks.tables import cell, figure, grid, machine_text, read_csv

RESULTS = Path(__file__).parent / "results"
_DEVICES = {"h100": "NVIDIA H100 80GB HBM3", "a100": "NVIDIA A100-SXM4-80GB"}
"""Each GPU of the plan as its driver calls it."""
_SYSTEMS = {
    "jpg, native": "dermscale native jpg, to the GPU",
    "jpg, dali": "dermscale dali jpg, on the GPU",
    "raw, native": "dermscale native raw, to the GPU",
    "resident": "dermscale resident, on the GPU",
}
"""Of each way to load (`benchmarks.plan.ways`), the system of the `loader` benchmark that measures it."""


def beside_measured(costs: Costs, results: Path = RESULTS) -> str:
    """A section for every GPU of the plan that `make gpu-check` ran on; empty where there is none."""
    found = [_of_gpu(gpu, path, one, costs, results / gpu) for gpu, path, one in _evidence(results / FOLDER.name)]
    return "\n".join(found)


def _evidence(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    for path in sorted(folder.glob("*.json")):
        one = read_evidence(path)
        for gpu, name in _DEVICES.items():
            if one["name"] == name:
                yield gpu, path, one


def _of_gpu(gpu: str, path: Path, one: Mapping[str, Any], costs: Costs, folder: Path) -> str:
    """Training of every model and, where the loaders were timed, every way to load."""
    machine = Machine(gpu, 1, one["environment"]["cores"])
    checks = {check["name"]: check["numbers"] for check in one["checks"]}
    lines = []
    for name, numbers in checks.items():
        model = name.removeprefix("training of ")
        if model == name or not numbers or model.endswith("(compiled)"):
            continue
        paper = gpu_rate(gpu, model, one["settings"]["resolution"])
        compiled = checks.get(f"{name} (compiled)")
        rates = [numbers["cached_img_per_s"]] + ([compiled["cached_img_per_s"]] if compiled else [])
        cells = [f"{figure(rate)}, {_place(rate, paper)}" for rate in rates]
        lines.append([model, span(paper), *cells, *[""] * (2 - len(cells))])
    batch_size, host = one["settings"]["batch_size"], one["environment"]["cpu"]
    link = f"../{(FOLDER / path.name).as_posix()}"
    parts = [
        f"""## Beside one {machine.card.name}

Measured since: one {one["name"]} with {machine.cores} cores of
{host}, which is another CPU than the paper's costs are of.
Training with one cached batch of {batch_size}, img/s, by `make gpu-check` ([all of it]({link})):

{grid(["model", "on paper", "measured, eager", "measured, compiled (CUDA graphs)"], lines)}"""
    ]
    table = folder / "loader-quick.csv"
    if table.exists():
        rows = read_csv(table)
        loads = []
        for way in ways(machine, costs, HAM10000_IMAGES):
            row = next((r for r in rows if r.system == _SYSTEMS[way.name] and r.metric == "img_per_s"), None)
            where = _place(row.value, way.rate) if row is not None and row.value is not None else ""
            loads.append([way.name, span(way.rate), cell(row), where])
        parts.append(
            "Loading, img/s, without training ([table](../"
            f"{(FOLDER.parent / folder.name / 'loader-quick.md').as_posix()})):\n\n"
            + grid(["way", "on paper", "measured", "it is"], loads)
        )
        native = next(r for r in rows if r.system == _SYSTEMS["jpg, native"] and r.metric == "cpu_s_per_1000")
        parts.append(machine_text(rows))
        if native.value is not None:
            parts.append(_lessons(native.value, machine.cores))
    return "\n".join(parts)


def _place(rate: float, paper: Span) -> str:
    """Where a measured rate lies."""
    if rate < paper.low:
        return f"{rate / paper.low:.2f} of the paper's least"
    if rate > paper.high:
        return f"{rate / paper.high:.2f} times the paper's most"
    return "within"


def _lessons(cpu_s_per_1000: float, cores: int) -> str:
    whole = digits(1000 * cores / cpu_s_per_1000)
    return f"""Where the measured rates are lower, what the paper does not count is likely why:

- A batch of 64 of a small network takes Python longer to launch than the GPU to compute: eager, a fifth to a half of
  the multiprocessors are busy, and CUDA graphs make ResNet-18 three times as fast.
- The loader's threads and the training loop share one Python, and hand each other its lock: of the native engine,
  {figure(cpu_s_per_1000)} CPU seconds for 1,000 images would be {whole} img/s on {cores} cores.
- A resident batch is a few kernels, whose launches take longer than they do.

So Python is what there is to save, before cores, decoders or links.
"""
