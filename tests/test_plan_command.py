"""`plan`: its arithmetic beside a plain recomputation, the page as the code gives it, and the measurement itself."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import plan_costs
from benchmarks.plan import (
    HAM10000_IMAGES,
    SPARE,
    Machine,
    Span,
    Way,
    cores_needed,
    forward_flop,
    gpu_rate,
    images_in,
    plan,
    published_flop,
    python_rate,
    relative_share,
    ways,
)
from benchmarks.plan_costs import PARTS
from benchmarks.plan_page import MACHINES, _cores, _in_short, page
from benchmarks.plan_words import digits, in_words, span
from benchmarks.published import BACKWARD, GPUS, H100_HOST, MIXER_GMACS, SAME_GPU, Figure, Gpu
from benchmarks.run import main
from shards.errors import DataError, UsageError
from tests.conftest import write_set
from train.models import MODELS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def costs():
    return plan_costs.read(plan_costs.DEFAULT)


def test_the_page_is_what_the_code_gives(costs):
    renew = "renew it with `python -m benchmarks.run plan --page docs/scaling.md`"
    assert PAGE.read_text(encoding="utf-8") == page(costs), renew


def figures() -> list[Figure]:
    found = [BACKWARD, H100_HOST, MIXER_GMACS, *(figure for figure in SAME_GPU.values() if figure)]
    for card in GPUS.values():
        for field in dataclasses.fields(Gpu):
            value = getattr(card, field.name)
            found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Figure)]
    return found


def test_every_published_figure_names_its_source_and_stands_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert len(figures()) > 25
    for figure in figures():
        assert figure.value > 0 and figure.unit and figure.what and figure.source
        assert figure.url.startswith("https://") and f"({figure.url})" in text
    for card in GPUS.values():
        for low, high in (card.pcie, card.resnet50, card.decode):
            assert high is None or low.value < high.value


def test_counted_flops_agree_with_what_the_libraries_publish():
    assert set(SAME_GPU) == set(MODELS)
    for model in SAME_GPU:
        assert forward_flop(model, 224) == pytest.approx(published_flop(model)[0], rel=0.01)


def test_gpu_rates_reproduce_the_published_ones():
    from benchmarks.speed import FORWARD_AND_BACKWARD

    assert BACKWARD.value == FORWARD_AND_BACKWARD
    for gpu, card in GPUS.items():
        rate = gpu_rate(gpu, "resnet50", 224)
        assert [rate.low, rate.high] == pytest.approx([figure.value for figure in card.resnet50])
        # The peak cancels out: another model's rate is ResNet-50's, times what the RTX 3090 makes of the two.
        for model, timed in SAME_GPU.items():
            if timed is not None:
                ratio = timed.value / SAME_GPU["resnet50"].value
                assert gpu_rate(gpu, model, 224).low == pytest.approx(card.resnet50[0].value * ratio)
    assert relative_share("alexnet") is None and relative_share("resnet50") == 1
    ratio = forward_flop("resnet50", 224) / forward_flop("alexnet", 224)
    assert gpu_rate("a100", "alexnet", 224).high == pytest.approx(GPUS["a100"].resnet50[1].value * ratio)


def test_a_smaller_resolution_trains_faster():
    assert gpu_rate("h100", "resnet18", 128).low > 2 * gpu_rate("h100", "resnet18", 224).low


def test_the_ways_are_the_least_of_their_parts(costs):
    machine = Machine("h100", 8, 64)
    jpg, dali, raw, resident = ways(machine, costs, HAM10000_IMAGES)
    jpg_s, raw_s, python_s, cut_s = (costs.s(part) for part in ("jpg", "raw", "python", "cut"))
    link = 8e9 / (224 * 224 * 3)
    assert jpg.rate.high == pytest.approx(min(56 / jpg_s, 8 / (python_s + cut_s), 64 * link))
    assert jpg.rate.low == pytest.approx(min(28 / jpg_s, 4 / (python_s + cut_s), 35.2 * link))
    assert raw.rate.high == pytest.approx(min(56 / raw_s, 8 / python_s, 64 * link))
    assert dali.rate.low == pytest.approx(
        min(56041, 28 / (costs.s("feed") + 0.35 * costs.s("decode whole")), 4 / costs.s("feed"))
    )
    assert resident.rate.low > 100 * jpg.rate.high
    for way in (jpg, dali, raw, resident):
        assert 0 < way.rate.low <= way.rate.high
        assert way.narrowest in dict(way.limits)


def test_a_way_never_gets_slower_with_more_cores_or_gpus(costs):
    for gpu in GPUS:
        for gpus in (1, 2, 8):
            before = None
            for cores in (16, 32, 64, 128):
                rates = [way.rate for way in ways(Machine(gpu, gpus, cores), costs, 1000)]
                if before is not None:
                    assert all(a.low >= b.low and a.high >= b.high for a, b in zip(rates, before, strict=True))
                before = rates
    few, many = (ways(Machine("a100", gpus, 64), costs, 1000) for gpus in (1, 2))
    assert all(b.limits[-1][1].low == pytest.approx(2 * a.limits[-1][1].low) for a, b in zip(few, many, strict=True))


def test_verdicts_hold_over_the_whole_of_both_ranges():
    way = Way("x", "native", (("a", Span(100, 200)), ("b", Span(150, 160))))
    assert way.rate == Span(100, 160) and way.narrowest == "a"
    assert way.verdict(Span(10, 100)) == "GPU"
    assert way.verdict(Span(160, 300)) == "a"
    assert way.verdict(Span(10, 101)) == way.verdict(Span(159, 300)) == "GPU or a"
    unknown = Way("x", "dali", (("a", Span(100, math.inf)),))
    assert unknown.verdict(Span(10, 50)) == "GPU" and unknown.verdict(Span(1e9, 2e9)) == "GPU or a"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("images", [HAM10000_IMAGES, 10**9])
def test_what_is_recommended_fits_and_is_not_beaten_at_the_low_end(costs, model, images):
    for machine in MACHINES:
        found = plan(machine, model, costs, images)
        assert found.use.fits and found.use in found.ways
        assert min(found.use.rate.low, found.gpu.low) == max(
            min(way.rate.low, found.gpu.low) for way in found.ways if way.fits
        )
        sure = [way for way in found.ways if way.fits and way.verdict(found.gpu) == "GPU"]
        assert not sure or found.use is sure[0]
        assert all(way.narrowest != "PCIe" for way in found.ways)  # as the page says


def test_resident_is_offered_while_it_fits(costs):
    pixels = 3 * costs.packed_px[0] * costs.packed_px[1]
    most = images_in(GPUS["a100"].memory.value * (1 - SPARE), pixels)
    for images, fits in ((most, True), (most + 1, False)):
        resident = ways(Machine("a100", 8, 16), costs, images)[-1]
        assert resident.engine == "resident" and resident.fits is fits


def test_cores_needed_reach_the_gpu(costs):
    gpu = gpu_rate("h100", "resnet18", 224)
    needed = cores_needed(gpu, costs.s("jpg"), Span(math.inf, math.inf))
    assert needed is not None
    assert (needed.low - 1) / costs.s("jpg") >= gpu.low > (needed.low - 2) / costs.s("jpg")
    assert (needed.high - 1) / (2 * costs.s("jpg")) >= gpu.high > (needed.high - 2) / (2 * costs.s("jpg"))


def test_cores_beyond_what_python_keeps_busy_are_not_asked_for(costs):
    made_up = {"jpg": 420e-6, "cut": 10e-6, "python": 30e-6, "raw": 125e-6}
    seconds = {name: dataclasses.replace(cost, median=made_up.get(name, 0.0)) for name, cost in costs.seconds.items()}
    costs = dataclasses.replace(costs, seconds=seconds)
    assert python_rate(costs, "jpg") == Span(pytest.approx(12_500), pytest.approx(25_000))
    assert _cores(Span(10_000, 12_400), costs, "jpg") == "6–12"
    assert _cores(Span(10_000, 200_000), costs, "jpg") == "6–12, then Python limits"
    assert _cores(Span(24_990, 200_000), costs, "jpg") == "12, then Python limits"
    assert _cores(Span(25_010, 200_000), costs, "jpg") == "Python limits first"
    assert _cores(Span(25_010, 200_000), costs, "raw") == "5–6, then Python limits"


@pytest.mark.parametrize("gpu", GPUS)
def test_python_stands_among_the_cores_where_it_stands_in_the_verdict(costs, gpu):
    """On a machine with more cores than any process can use, what is left is Python."""
    jpg, _, raw, _ = ways(Machine(gpu, 1, 10_000), costs, HAM10000_IMAGES)
    ends = {"GPU": "", "GPU or Python": ", then Python limits", "Python": "Python limits first"}
    for model in SAME_GPU:
        rate = gpu_rate(gpu, model, costs.resolution_px)
        for kind, way in (("jpg", jpg), ("raw", raw)):
            assert way.rate == python_rate(costs, kind)
            cell = _cores(rate, costs, kind)
            assert cell.lstrip("0123456789–") == ends[way.verdict(rate)]


def test_the_page_calls_the_link_wide_only_where_it_is(costs):
    sentence = "The link to the GPU is nowhere the narrowest part."
    assert sentence in _in_short(costs)
    quick = {name: dataclasses.replace(cost, median=cost.median / 100) for name, cost in costs.seconds.items()}
    assert sentence not in _in_short(dataclasses.replace(costs, seconds=quick))


def test_numbers_keep_three_digits():
    assert [digits(v) for v in (0.012345, 1.2345, 123.45, 12345.0, 2852049)] == [
        "0.0123",
        "1.23",
        "123",
        "12,300",
        "2,850,000",
    ]
    assert span(Span(7005.1, math.inf)) == "7,010 or more" and span(Span(1, 2), 10) == "10.0–20.0"


def test_the_command_says_what_to_use_and_what_limits(costs):
    said = CliRunner().invoke(main, ["plan", "--gpu", "h100", "--cores", "16", "--model", "resnet18", "--ram-gb", "2"])
    assert said.exit_code == 0, said.output
    assert said.output.strip() == in_words(plan(Machine("h100", 1, 16), "resnet18", costs), costs, 2.0).strip()
    assert re.search(r"^Use: --engine (native|dali|resident) ", said.output, flags=re.M)
    assert re.search(r"^Limit: \w+", said.output, flags=re.M)
    assert "As jpg the set takes" in said.output and "fits 2 GB of RAM" in said.output
    assert "and leaves 2 GB of RAM" in said.output and "GB/s" in said.output


def refused(words: str) -> str:
    done = CliRunner().invoke(main, words.split())
    assert isinstance(done.exception, UsageError | DataError), done.output
    return str(done.exception)


def test_wrong_use_is_one_clear_line(tmp_path):
    assert "a100, h100" in refused("plan --gpu v100")
    assert "alexnet" in refused("plan --model vgg11")
    assert "9 or more" in refused("plan --gpus 8 --cores 8")
    assert "--measure" in refused("plan --data somewhere")
    assert "--measure" in refused("plan --resolution 128")
    assert "--data" in refused("plan --measure")
    assert "no such file" in refused(f"plan --costs {tmp_path / 'none.json'}")
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"images": 3}')
    assert "damaged" in refused(f"plan --costs {damaged}")


def test_costs_survive_their_file(costs, tmp_path):
    plan_costs.write(tmp_path / "costs.json", costs)
    assert plan_costs.read(tmp_path / "costs.json") == costs


def test_committed_costs_add_up(costs):
    whole = sum(costs.s(part) for part in ("decode", "cut", "python", "checksum jpg", "resize"))
    assert whole == pytest.approx(costs.s("jpg"), rel=0.2)  # medians of differences need not add up exactly
    assert all(cost.low <= cost.median <= cost.high for cost in costs.seconds.values())
    assert costs.s("copy") < costs.s("raw") < costs.s("jpg")


def test_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_costs, "_TURN_S", 0.001)
    monkeypatch.setattr(plan_costs, "_EPOCH", 64)
    monkeypatch.setattr(plan_costs, "IMAGES", 70)
    write_set(tmp_path / "set", images=140)
    rounds = []
    found = plan_costs.measure(tmp_path / "set", resolution_px=64, rounds=3, command="x", told=lambda: rounds.append(1))
    assert len(rounds) == 4 and found.rounds == 3 and found.images == 70
    assert found.packed_px == (72, 96) and found.resolution_px == 64
    assert found.raw_bytes == 72 * 96 * 3 + 128 and 0 < found.jpg_bytes < found.raw_bytes
    assert set(found.seconds) == set(PARTS)
    for part in ("jpg", "raw", "cut", "copy", "decode whole", "feed", "checksum jpg", "checksum raw"):
        assert 1e-8 < found.s(part) < 0.1
    assert not [path for path in tmp_path.iterdir() if path.name != "set"]
    with pytest.raises(UsageError, match="JPEGs"):
        plan_costs.measure(write_raw_set(tmp_path), resolution_px=64, rounds=1, command="x", told=lambda: None)


def write_raw_set(folder: Path) -> Path:
    write_set(folder / "raw", "raw", images=140)
    return folder / "raw"


def test_differences_are_taken_apart():
    turn = {"jpg": 100.0, "jpg tiny": 80.0, "raw": 50.0, "raw tiny": 12.0, "cut": 5.0, "copy": 1.0}
    turn |= {"checksum jpg": 1.0, "checksum raw": 4.0, "decode whole": 90.0, "feed": 2.0}
    found = plan_costs._apart(turn)
    assert found["python"] == 8 and found["resize"] == 20 and found["resize raw"] == 38
    assert found["decode"] == 80 - 1 - 5 - 8
