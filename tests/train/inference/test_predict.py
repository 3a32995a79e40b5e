"""`python -m train.predict`: original files get the predictions of the evaluation; each is predicted or refused."""

import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from preprocess.ham10000 import read_source
from preprocess.packing import Settings, pack
from preprocess.records import Records
from shards import Loader, ShardSet
from shards.common.errors import DataError, UsageError
from shards.common.machine import Load
from shards.format import HAM10000, Classes, EncodeSpec
from tests.support.train_runs import child_environment
from tests.train.inference.conftest import train_on
from tests.train.inference.test_images import png_header
from train.evaluation import used_temperature
from train.inference.images import read_image
from train.inference.output import ISIC_COLUMNS
from train.inference.predictor import Ensemble, Predictor, load_network, predict_files, read_about
from train.inference.resnet import LAYERS, ResNet
from train.metrics.calibration import class_prior, softmax
from train.predict import main as predict_command

ROOT = Path(__file__).parents[3]
PROBABILITIES = [f"prob_{dx}" for dx in HAM10000.names]


@pytest.fixture(scope="module")
def runs(raw: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`quick`: a ResNet, JPEG, balanced prior. `timm`: another, bicubic, jpg and raw, training prior, symmetries."""
    encode = EncodeSpec(write_mode="proportion", max_resolution=64, jpeg_quality=85)
    more = {"loss": "plain", "tta": "symmetries", "interpolation": "bicubic"}
    return {"quick": run, "timm": train_on(raw, tmp_path_factory.mktemp("timm"), encode, **more)}


def predict(*arguments: object, python: tuple[str, ...] = ("-m", "train.predict")) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=child_environment())


def predict_here(*arguments: object) -> int:
    """The same in this process, without the start of another; the exit code, or the error of the command."""
    return predict_command.main(list(map(str, arguments)), standalone_mode=False)


def table(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text)).set_index("image")


# ------------------------------------------------------------------ the predictions of the evaluation


@pytest.mark.parametrize("name", ["quick", "timm"])
def test_original_files_give_the_probabilities_of_the_evaluation(name, runs, raw, tmp_path):
    out = tmp_path / "predictions.csv"
    done = predict("--run", runs[name], raw, "--out", out, "--batch-size", 16)
    assert done.returncode == 0, done.stderr
    expected = pd.read_parquet(runs[name] / "predictions.parquet").set_index("image_id")
    found = table(out.read_text()).loc[expected.index]
    np.testing.assert_allclose(found[PROBABILITIES], expected[PROBABILITIES], rtol=0, atol=1e-4)
    assert set(found["prior"]) == {{"quick": "balanced", "timm": "training"}[name]}
    assert expected[PROBABILITIES].to_numpy().std(axis=0).max() > 1e-3  # the images do differ


def test_a_shard_set_is_predicted_without_its_labels(runs, raw, tmp_path, capsys, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    unlabelled = replace(read_source(raw), classes=Classes(()))
    unlabelled.records = Records(replace(record, dx=None) for record in unlabelled.records)
    images = len(unlabelled.records)
    encode = ShardSet(runs["quick"].parent / "shards").manifest.encode
    pack(unlabelled, tmp_path / "set", Settings(encode=encode))
    out = tmp_path / "predictions.csv"
    assert predict_here("--run", runs["quick"], tmp_path / "set", "--out", out, "--device", "cpu") == 0
    expected = pd.read_parquet(runs["quick"] / "predictions.parquet").set_index("image_id")
    found = table(out.read_text())
    assert len(found) == images
    np.testing.assert_allclose(found.loc[expected.index, PROBABILITIES], expected[PROBABILITIES], rtol=0, atol=1e-4)
    for two in ((raw, tmp_path / "set"), (tmp_path / "set", tmp_path / "set"), ("s3://bucket/set", raw)):
        with pytest.raises(UsageError, match="is a shard set; predict it alone"):
            predict_here("--run", runs["quick"], *two)
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "set").iterdir():
        memory.pipe_file(f"/predicted/{file.name}", file.read_bytes())
    asked = ("--run", runs["quick"], "memory://predicted", "--out", tmp_path / "stored.csv", "--device", "cpu")
    monkeypatch.setenv("DERMSCALE_CACHE", str(tmp_path / "cache"))
    assert predict_here(*asked) == 0 and (tmp_path / "stored.csv").read_bytes() == out.read_bytes()
    other = tmp_path / "other"  # a folder of images with a file of this name, and a path that cannot be looked at
    other.mkdir()
    shutil.copy(next(raw.rglob("*.jpg")), other)
    (other / "manifest.json").write_text('{"name": "a web page"}')
    asked = ("--run", runs["quick"], other, tmp_path / ("x" * 300), "--out", out, "--device", "cpu")
    assert predict_here(*asked) == 1 and len(table(out.read_text())) == 1
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quick", "timm"])
def test_packed_files_are_not_encoded_a_second_time(name, runs, tmp_path):
    predictor = Predictor(runs[name], "cpu")
    data = ShardSet(runs[name].parent / "shards")
    expected = pd.read_parquet(runs[name] / "predictions.parquet").set_index("image_id")
    for sample in data.select("test").samples:
        if data.column("encoding")[sample] == "jpg":
            image_id = data.column("image_id")[sample]
            file = tmp_path / f"{image_id}.jpg"
            file.write_bytes(data.read(sample))
            square = predictor.prepare(read_image(file), "any name").square
            found = predictor.probabilities(predictor.logits(square[None]))[0]
            np.testing.assert_allclose(found, expected.loc[image_id, PROBABILITIES].to_numpy(float), rtol=0, atol=1e-5)


def test_the_input_of_the_network_equals_the_evaluations_byte_for_byte(runs, raw):
    predictor = Predictor(runs["quick"], "cpu")
    data = ShardSet(runs["quick"].parent / "shards")
    loader = Loader(data.select("test"), batch_size=8, resolution=32, train=False, engine="native")
    files = {file.stem: file for file in raw.rglob("*.jpg")}
    for batch in loader:
        for image, sample in zip(batch.images[batch.mask], batch.samples[batch.mask], strict=True):
            name = data.column("image_id")[int(sample)]
            square = predictor.prepare(read_image(files[name]), name).square
            assert np.array_equal(square, image.permute(1, 2, 0).numpy())
    loader.close()


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_resnets_are_timms_bit_for_bit(name):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # pyright: ignore
            module.running_var.uniform_(0.5, 1.5)  # pyright: ignore
    ours = ResNet(name, 7)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(theirs(x), ours.eval()(x))
        features = [net.forward_head(net.forward_features(x), pre_logits=True) for net in (theirs, ours)]
    assert torch.equal(*features)


# ------------------------------------------------------------------ probabilities


def test_temperature_comes_first_and_the_prior_after_it(runs):
    predictor = Predictor(runs["timm"], "cpu")
    counts = (5, 10, 20, 40, 0, 80, 160)
    predictor.about = replace(predictor.about, prior="training", temperature=2.0, class_counts=counts)
    logits = np.random.default_rng(0).normal(0, 3, (50, 7))
    own = predictor.probabilities(logits)
    trained = np.array(counts) > 0
    assert np.allclose(own[:, trained], softmax(logits[:, trained] / 2)) and not own[:, ~trained].any()
    # Bayes: posterior / prior is proportional to the likelihood, whatever the prior
    balanced = predictor.probabilities(logits, "balanced")
    expected = own[:, trained] / class_prior("training", counts)[trained]
    assert np.allclose(balanced[:, trained], expected / expected.sum(axis=1, keepdims=True))
    with pytest.raises(UsageError, match="uniform"):
        predictor.probabilities(logits, "uniform")


def test_a_temperature_at_its_limit_is_not_used():
    assert used_temperature({"temperature_scaling": {"temperature": 1.7, "at_limit": False}}) == 1.7
    assert used_temperature({"temperature_scaling": {"temperature": 20.0, "at_limit": True}}) == 1.0


def test_views_average_over_the_mirror_images_and_their_transposes(runs):
    predictor = Predictor(runs["quick"], "cpu")
    square = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    views = np.concatenate([square, square[:, ::-1], square[:, :, ::-1], square[:, ::-1, ::-1]])
    averaged = predictor.logits(views, "flips")
    assert np.allclose(averaged, averaged[0], atol=1e-5)  # a mirrored image has the same four views
    assert np.allclose(averaged[0], predictor.logits(views).mean(axis=0), atol=1e-5)
    assert predictor.logits(views).std(axis=0).max() > 1e-3
    eight = np.concatenate([views, views.transpose(0, 2, 1, 3)])
    averaged = predictor.logits(eight, "symmetries")
    assert np.allclose(averaged, predictor.logits(eight).mean(axis=0), atol=1e-5)
    assert Predictor(runs["timm"], "cpu").about.tta == "symmetries"


# ------------------------------------------------------------------ any file, each predicted or refused


@pytest.fixture(scope="module")
def mixed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files; the good ones show one image."""
    folder = tmp_path_factory.mktemp("mixed")
    data = next(raw.rglob("*.jpg")).read_bytes()
    image = Image.open(io.BytesIO(data))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    image.save(folder / "good.png")
    (folder / "good.jpg").write_bytes(data)
    (folder / "cut.jpg").write_bytes(data[:-300])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_header(40_000, 40_000))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    return folder


def test_bad_files_are_named_and_the_rest_goes_on(runs, mixed, tmp_path):
    done = predict("--run", runs["quick"], mixed, mixed / "missing.jpg", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    shown = {one["image"] + Path(one["file"]).suffix: one["probabilities"] for one in found["images"]}
    assert set(shown) == {"good.jpg", "good.png", "turned.png", "cmyk.jpg"}
    assert all(abs(sum(one.values()) - 1) < 1e-4 for one in shown.values())
    assert shown["good.jpg"] == shown["good.png"] == shown["turned.png"]
    reasons = {Path(one["file"]).name: one["reason"] for one in found["refused"]}
    expected = {
        "cut.jpg": "damaged",
        "text.jpg": "not an image",
        "empty.png": "empty",
        "bomb.png": "100 megapixels",
        "missing.jpg": "does not exist",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name]
        assert any(line.startswith("refused:") and name in line for line in done.stderr.splitlines())
    assert "not a medical device" in done.stderr and "not a medical device" in found["notice"]
    assert "Traceback" not in done.stderr


def test_images_of_one_pixel_are_predicted_and_empty_ones_refused(runs, tmp_path, capsys):
    for name, size in (("one", (1, 1)), ("row", (300, 1)), ("column", (1, 300))):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / f"{name}.png")
    (tmp_path / "zero.jpg").touch()
    maps = ("--explain", "--explain-out", tmp_path / "maps")
    assert predict_here("--run", runs["quick"], tmp_path, "--json", "--tta", "flips", *maps) == 1
    output, errors = capsys.readouterr()
    found = json.loads(output)
    shown = {one["image"]: list(one["probabilities"].values()) for one in found["images"]}
    # the evaluation crop of an even colour is that colour, of whatever size; JPEG changes it a little
    assert set(shown) == {"one", "row", "column"} and np.ptp(np.array(list(shown.values())), axis=0).max() < 0.01
    assert all(Path(one["explanation"]).is_file() for one in found["images"])
    assert f"refused: {tmp_path / 'zero.jpg'} is empty\n" in errors


def test_an_image_too_large_for_memory_is_refused_and_the_rest_goes_on(runs, raw, monkeypatch, capsys):
    shrink = cv2.resize

    def scarce(image: np.ndarray, size: tuple[int, int], **options: int) -> np.ndarray:
        return shrink(image[:0] if image.shape[0] == 61 else image, size, **options)

    monkeypatch.setattr(cv2, "resize", scarce)
    Image.new("RGB", (80, 61)).save(raw.parent / "large.png")
    assert predict_here("--run", runs["quick"], raw.parent / "large.png", next(raw.rglob("*.jpg"))) == 1
    output, errors = capsys.readouterr()
    assert output.startswith(str(raw)) and "large.png" not in output
    assert f"refused: {raw.parent / 'large.png'} cannot be packed (OpenCV: " in errors


def test_several_runs_give_the_mean_of_their_probabilities(runs, raw, tmp_path, capsys):
    """They may be of other networks, packings and crops. Each sees an image as it does alone."""
    images, both = sorted(raw.rglob("*.jpg"))[:6], ("--run", runs["quick"], "--run", runs["timm"])
    alone = []
    for run in (runs["quick"], runs["timm"]):
        assert predict_here("--run", run, *images, "--prior", "balanced", "--out", tmp_path / "one.csv") == 0
        alone.append(table((tmp_path / "one.csv").read_text()))
    assert predict_here(*both, *images, "--prior", "balanced", "--out", tmp_path / "both.csv") == 0
    found = table((tmp_path / "both.csv").read_text())
    np.testing.assert_allclose(found[PROBABILITIES], (alone[0][PROBABILITIES] + alone[1][PROBABILITIES]) / 2, atol=2e-6)
    assert (alone[0][PROBABILITIES] - alone[1][PROBABILITIES]).abs().max().max() > 0.01
    assert found["temperature"].iloc[0] == " ".join(f"{one['temperature'].iloc[0]:g}" for one in alone)
    capsys.readouterr()
    assert predict_here(*both, images[0], "--prior", "balanced") == 0
    assert "They are the mean of 2 networks: resnet18 at 32 px and test_resnet at 32 px." in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"assume other priors \(balanced, training\).* name one with --prior"):
        predict_here(*both, images[0])
    with pytest.raises(UsageError, match="explain each run on its own"):
        predict_here(*both, images[0], "--prior", "balanced", "--explain", "--explain-out", tmp_path / "maps")


def test_an_ensemble_of_a_run_and_its_copy_is_that_run(runs, raw, tmp_path):
    image, copied = next(raw.rglob("*.jpg")), shutil.copytree(runs["quick"], tmp_path / "copied")
    texts = []
    for number in (1, 2):
        options = ("--run", runs["quick"], "--run", copied)[: 2 * number]
        out = tmp_path / str(number)
        assert predict_here(*options, image, "--json", "--explain", "--explain-out", out, "--out", tmp_path / "a") == 0
        texts.append(json.loads((tmp_path / "a").read_text()))
    assert texts[0]["images"][0]["probabilities"] == texts[1]["images"][0]["probabilities"]
    assert texts[1]["model"] == ["resnet18", "resnet18"] and texts[0]["model"] == "resnet18"
    maps = [(tmp_path / number / f"{image.stem}.png").read_bytes() for number in "12"]
    assert maps[0] == maps[1]


def test_files_keep_their_order_whatever_the_batch(runs, mixed):
    ensemble = Ensemble([runs["quick"]], "cpu")
    files = sorted(mixed.iterdir())
    for size in (1, 3, 100):
        assert [one.file for batch in predict_files(ensemble, files, batch_size=size) for one in batch] == files


@pytest.mark.parametrize(("options", "ending"), [((), "csv"), (("--json",), "json"), (("--isic",), "csv")])
def test_answers_so_far_outlive_an_end_before_the_last(options, ending, runs, raw, tmp_path, monkeypatch, capsys):
    images = sorted(raw.rglob("*.jpg"))[:8]
    out = tmp_path / f"answers.{ending}"
    part = tmp_path / f"answers.{ending}.part"
    asked = ("--run", runs["quick"], *images, *options, "--out", out, "--batch-size", 3)
    assert predict_here(*asked) == 0
    whole = out.read_text()
    assert not part.exists()
    seen = []

    def two_batches(*arguments: object):
        for number, batch in enumerate(predict_files(*arguments)):  # pyright: ignore[reportArgumentType]
            seen.append(part.read_text())  # as another process reads it, or this one after a kill
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr("train.inference.predictor.predict_files", two_batches)
        out.write_text("an older file")
        with pytest.raises(click.Abort):
            predict_here(*asked)
    assert out.read_text() == "an older file"
    assert f"the answers so far are in {part}" in capsys.readouterr().err
    assert all(whole.startswith(text) for text in seen)
    assert [text.count("ISIC") for text in seen] == [n * whole.count("ISIC") // 8 for n in (0, 3, 6)]
    assert part.read_text() == seen[-1]
    if ending == "json":  # each prediction is a line, and an object of its own
        [line] = [line for line in seen[-1].splitlines() if images[5].stem in line]
        assert json.loads(line.lstrip(" ,"))["image"] == images[5].stem
    assert predict_here(*asked) == 0
    assert out.read_text() == whole
    assert part.read_text() == seen[-1]  # nobody deletes them but the user
    assert sorted(tmp_path.iterdir()) == [out, part]


def test_names_that_are_not_utf8_keep_their_answers(runs, raw, tmp_path, capfdbinary):
    odd = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    odd.write_bytes(next(raw.rglob("*.jpg")).read_bytes())
    bad = tmp_path / os.fsdecode(b"\xff.jpg")
    bad.touch()
    asked = ("--run", runs["quick"], odd, bad)
    assert predict_here(*asked) == 1
    assert capfdbinary.readouterr().out.startswith(os.fsencode(odd) + b"  ")
    for options in ((), ("--out", tmp_path / "answers.json")):
        assert predict_here(*asked, "--json", *options) == 1
        text = (tmp_path / "answers.json").read_bytes() if options else capfdbinary.readouterr().out
        answers = json.loads(text)
        assert answers["images"][0]["file"] == str(odd) and answers["refused"][0]["file"] == str(bad)
    for options in (("--isic",), ("--isic", "--out", tmp_path / "a.csv"), ("--out", tmp_path / "a.csv")):
        assert predict_here(*asked, *options) == 1
        text = capfdbinary.readouterr().out if "--out" not in options else (tmp_path / "a.csv").read_bytes()
        assert list(table(text.decode()).index) == ["caf\\udce9"]
    out = tmp_path / os.fsdecode(b"\xe9.csv")
    assert predict_here(*asked, "--out", out) == 1 and len(table(out.read_text())) == 1


def test_the_isic_submission_follows_the_rules_of_its_scorer(runs, raw, tmp_path):
    # the rules of isic_challenge_scoring/load_csv.py 5.6; the scorer itself needs pandas 2, so it is not installed here
    out = tmp_path / "submission.csv"
    images = sorted(raw.rglob("*.jpg"))[:9]
    assert predict_here("--run", runs["quick"], *images, "--isic", "--out", out) == 0
    with out.open() as file:
        head, *rows = csv.reader(file)
    assert head == ["image", *ISIC_COLUMNS]
    assert sorted(column.lower() for column in ISIC_COLUMNS) == list(HAM10000.names)
    assert [row[0] for row in rows] == [image.stem for image in images]
    found = pd.read_csv(out)
    assert all(found[column].dtype == np.float64 and found[column].between(0, 1).all() for column in ISIC_COLUMNS)
    assert predict_here("--run", runs["quick"], *images, "--out", tmp_path / "plain.csv") == 0
    plain = table((tmp_path / "plain.csv").read_text()).loc[found["image"]]
    for column in ISIC_COLUMNS:
        np.testing.assert_allclose(found[column], plain[f"prob_{column.lower()}"], atol=2e-6)


def test_lines_for_people_give_class_probability_and_prior(runs, raw, capsys):
    image = next(raw.rglob("*.jpg"))
    assert predict_here("--run", runs["timm"], image) == 0
    shown = capsys.readouterr().out
    assert str(image) in shown and "%" in shown and "training prior" in shown


def test_wrong_usage_is_reported_before_any_work(runs, raw, mixed, tmp_path):
    image = next(raw.rglob("*.jpg"))
    run = runs["quick"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "model.safetensors").write_bytes(pickle.dumps({"weights": 1}))
    (tmp_path / "file").write_text("")
    for arguments, kind, text in (
        ((run, image, "--json", "--isic"), UsageError, "exclude each other"),
        ((run, image, "--prior", "uniform"), click.BadParameter, "'balanced', 'training'"),
        ((run, mixed / "good.jpg", mixed / "good.png", "--isic"), UsageError, "both named good"),
        ((tmp_path, image, "--out", tmp_path), UsageError, "is a folder; give the name of a file"),
        ((tmp_path, image, "--out", tmp_path / "none" / "a.csv"), UsageError, "none is not a folder; create it"),
        ((tmp_path, image, "--out", tmp_path / "file" / "a.csv"), UsageError, "file is not a folder; create it"),
        ((tmp_path, image, "--out", "/dev/null"), UsageError, "not a regular file"),
        ((tmp_path, image, "--out", image), UsageError, "is the name of an image"),
        ((tmp_path, image, "--out", "/proc/a.csv"), OSError, "a.csv.part"),  # before it is seen that there is no run
        ((tmp_path, image, "--out", tmp_path / "new.csv"), DataError, "not a run folder"),
        ((tmp_path, image, "--explain", "--explain-out", tmp_path / "file"), UsageError, "is a file; choose a folder"),
        ((run, image, "--explain", "--explain-out", tmp_path / "file" / "a"), NotADirectoryError, "file"),
        ((run, tmp_path / "empty"), DataError, "holds no image"),
        ((tmp_path, image), DataError, "not a run folder"),
        ((run / "model.safetensors", image), DataError, "is a file; give the folder"),
        ((tmp_path / "unfinished", image), DataError, "not finished"),
        ((tmp_path / "hostile", image), DataError, "no readable weights"),
    ):
        with pytest.raises(kind, match=text):
            predict_here("--run", *arguments)
    assert not list(tmp_path.glob("new.csv*"))


def test_weights_of_another_model_are_refused(runs):
    about = read_about(runs["quick"])
    with pytest.raises(DataError, match="weights of another model or size"):
        load_network(runs["quick"], replace(about, model="resnet34"))


def test_explanations_are_written_for_each_image_even_of_one_name(runs, mixed, tmp_path, capsys):
    out = tmp_path / "maps"
    images = (mixed / "good.jpg", mixed / "good.png")
    assert predict_here("--run", runs["quick"], *images, "--json", "--explain", "--explain-out", out) == 0
    files = [Path(one["explanation"]) for one in json.loads(capsys.readouterr().out)["images"]]
    assert files == [out / "good.png", out / "good-2.png"]
    assert all(Image.open(file).size == (2 * 64, 48) for file in files)


@pytest.mark.parametrize(
    ("broken", "error", "reason"),
    [
        ("explain.Explainer.maps", AssertionError("no\nlayer"), "AssertionError: no layer"),
        ("predictor.write_durably", OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_map_that_fails_costs_only_the_map(broken, error, reason, runs, mixed, tmp_path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    command = ("--run", runs["quick"], mixed / "good.jpg", "--json")
    predict_here(*command)
    expected = json.loads(capsys.readouterr().out)["images"][0]["probabilities"]
    monkeypatch.setattr(f"train.inference.{broken}", fail)
    assert predict_here(*command, "--explain", "--explain-out", tmp_path / "maps") == 1
    output, errors = capsys.readouterr()
    found = json.loads(output)["images"][0]
    assert found["probabilities"] == expected and found["explanation"] is None and reason in found["explanation_error"]
    told = [line for line in errors.splitlines() if "not explained" in line]
    assert len(told) == 1 and "good.jpg" in told[0] and reason in told[0]


def test_predicting_with_a_resnet_imports_neither_timm_nor_the_compiler(runs, mixed):
    program = (
        "import sys; from train.predict import main; main.main(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'timm', 'torchvision', 'torch._dynamo', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = predict("--run", runs["quick"], mixed / "good.jpg", python=("-c", program))
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]"


def test_threads_are_set_and_other_programs_on_their_cores_are_named_once(runs, mixed, monkeypatch, capsys):
    own = torch.get_num_threads()
    monkeypatch.setattr("train.crowding.LOOK_S", 0.0)
    monkeypatch.setattr("train.crowding.LoadMeter.read", lambda self: Load(2, 1.0, 300.0))
    try:
        for threads in (2, 1):
            predict_here("--run", runs["quick"], "--device", "cpu", "--threads", threads, "--batch-size", 1, mixed)
            assert torch.get_num_threads() == threads
            assert capsys.readouterr().err.count("warning: other programs slow this one down") == threads - 1
    finally:
        torch.set_num_threads(own)
