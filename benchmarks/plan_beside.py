"""What the plan says on paper beside what was measured since, of the GPUs that results are committed of."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, read_evidence
from benchmarks.measure import Row
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
    rows = (
        [row for row in read_csv(table) if row.environment and row.environment.gpu == one["name"]]
        if table.exists()
        else []
    )
    if rows:
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
        parts.append(machine_text(rows))
    return "\n".join([*parts, _lessons(checks, rows, machine.cores)])


def _place(rate: float, paper: Span) -> str:
    """Where a measured rate lies."""
    if rate < paper.low:
        return f"{rate / paper.low:.2f} of the paper's least"
    if rate > paper.high:
        return f"{rate / paper.high:.2f} times the paper's most"
    return "within"


def _lessons(checks: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], cores: int) -> str:
    """What the measured rates say of what the paper leaves out."""
    # a check that failed has no numbers
    trained = {name: one for name, one in checks.items() if name.startswith("training of ") and one}
    eager = {name: one for name, one in trained.items() if "(" not in name}
    read = [one.get("utilization", {}) for one in eager.values()]
    busy = [one["sm_percent"]["mean"] for one in read if "sm_percent" in one]
    lines = []
    if busy:
        lines.append(
            f"- Of the multiprocessors {min(busy):.0f} to {max(busy):.0f} % were busy in eager training with the "
            "loader: small networks are launched more slowly than they are computed."
        )
    for name, one in trained.items():
        if name.endswith(" (compiled)") and name.removesuffix(" (compiled)") in eager:
            before, after = (eager[name.removesuffix(" (compiled)")][key] for key in ("cached_img_per_s", "img_per_s"))
            lines.append(
                f"- CUDA graphs make {name.removeprefix('training of ').removesuffix(' (compiled)')} "
                f"{one['cached_img_per_s'] / before:.1f} times as fast on a cached batch and "
                f"{one['img_per_s'] / after:.1f} times with the loader."
            )
    cpu_s = next((r.value for r in rows if r.system == _SYSTEMS["jpg, native"] and r.metric == "cpu_s_per_1000"), None)
    if cpu_s is not None:
        whole = digits(1000 * cores / cpu_s)
        lines.append(
            f"- The native engine's {figure(cpu_s)} CPU seconds for 1,000 images would be {whole} img/s on {cores} "
            "cores: its threads wait for Python's lock."
        )
        lines.append("- A resident batch is a few kernels, whose launches take longer than they do.")
    text = "\n".join(lines)
    return f"What the paper does not count, and is likely why some rates are lower:\n\n{text}\n" if lines else ""
