"""Models by name: sizes and their limits, weights from files, what the optimizer sees."""

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

from shards.common.errors import DataError, UsageError
from train import models
from train.weights import Weights, load_fitting, write_weights

MEAN, STD = (0.7, 0.5, 0.4), (0.2, 0.15, 0.1)


def build(name: str, px: int = 32, classes: int = 7, **more: object) -> models.Classifier:
    torch.manual_seed(0)
    return models.build(name, px, classes, MEAN, STD, **more)  # type: ignore[arg-type]


def logits(net: models.Classifier, px: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, px, px, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    with torch.no_grad():
        return net.eval()(images, torch.eye(3, 4).repeat(2, 1, 1))


# ------------------------------------------------------------------ names and sizes


def test_family_of_a_named_model_is_what_its_layers_say() -> None:
    for name, known in models.MODELS.items():
        if known.timm is not None:
            assert models.family(known.timm) == known.family, name
    assert models.family("test_convnext") == "layernorm"


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(UsageError) as error:
        models.timm_name("resnet19")
    assert all(name in str(error.value) for name in models.MODELS)
    assert "did you mean" in str(error.value)


@pytest.mark.parametrize(
    ("name", "px", "start", "words"),
    [
        ("alexnet", 62, None, "63 px"),
        ("alexnet", 94, 62, "63 px"),
        ("vit_b16", 100, None, "multiple of 16"),
        ("mixer_b16", 8, None, "16 px"),
        ("mixer_b16", 96, 64, "mixer_b16"),
        ("resnet18", 16, None, "32 px"),
        ("swin_tiny_patch4_window7_224", 96, 64, "one size"),
        ("test_vit", 40, None, "cannot"),
        ("vit_small_patch14_dinov2", 448, 224, "256 px"),  # 14 divides both ends of the ramp
    ],
)
def test_impossible_sizes_are_refused_by_name(name: str, px: int, start: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        models.check_resolution(name, px, start)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_a_ramp_runs_at_all_its_sizes(name: str) -> None:
    net = build(name, 96, start_resolution=32)
    for px in (32, 64, 96):
        assert logits(net, px).shape == (2, 7)


def test_the_seed_alone_decides_the_weights() -> None:
    a, b = build("test_resnet"), build("test_resnet")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_layout_is_channels_last() -> None:
    weight = next(p for p in build("test_resnet").parameters() if p.ndim == 4 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "device", "wanted", "expected"),
    [
        ("repvgg_a0", "cpu", "auto", "contiguous"),
        ("fastvit_t8", "cpu", "auto", "contiguous"),
        ("repvgg_a0", "cuda", "auto", "channels-last"),
        ("repvgg_a0", "cpu", "channels-last", "channels-last"),
        ("test_resnet", "cpu", "auto", "channels-last"),
        ("resnet18", "cpu", "auto", "channels-last"),  # has strided 1×1 convolutions, of 64 channels and more
        ("test_resnet", "cpu", "contiguous", "contiguous"),
    ],
)
def test_a_network_that_pytorch_cannot_run_channels_last_on_a_cpu_is_contiguous(name, device, wanted, expected) -> None:
    net = build(name, 64)
    decision = models.lay_out(net, wanted, torch.device(device))
    layout = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}[expected]
    assert decision.value == expected
    assert all(p.is_contiguous(memory_format=layout) for p in net.parameters() if p.ndim == 4)
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert net.head(images, torch.eye(3, 4).repeat(2, 1, 1)).is_contiguous(memory_format=layout)
    assert ("conv" in decision.reason) == (wanted == "auto" and expected == "contiguous")


# ------------------------------------------------------------------ weights in files


def test_saved_weights_load_here_and_into_plain_timm(tmp_path: Path) -> None:
    net = build("test_resnet")
    metadata = {"mean": json.dumps([0.1, 0.2, 0.3]), "std": json.dumps([1, 2, 3])}
    write_weights(tmp_path / "w.safetensors", net.body, metadata)
    torch.manual_seed(9)
    again = models.build("test_resnet", 32, 7, MEAN, STD, weights=tmp_path / "w.safetensors")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    torch.testing.assert_close(again.head.mean, torch.tensor([0.1, 0.2, 0.3]))
    plain = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(v, net.body.state_dict()[k]) for k, v in plain.state_dict().items())


def test_alexnet_starts_with_activations_of_one_scale() -> None:
    """Without normalisation a signal that shrinks by layer does not learn: logits must vary with the image."""
    torch.manual_seed(0)
    net = build("alexnet", 64, classes=7).eval()
    with torch.no_grad():
        logits = net.body(torch.randn(64, 3, 64, 64))
    assert 0.1 < float(logits.std(0).mean()) < 10


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "alexnet"])
def test_a_classifier_for_other_classes_stays_random(tmp_path: Path, name: str) -> None:
    px = 64 if name == "alexnet" else 32
    source = build(name, px, classes=1000)
    write_weights(tmp_path / "w.safetensors", source.body, {})
    net = build(name, px, weights=tmp_path / "w.safetensors")
    same = [torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items() if v.shape[:1] != (7,)]
    assert all(same) and len(same) == len(source.state_dict()) - 2
    assert logits(net, px).shape == (2, 7)


def test_position_embeddings_are_resampled_to_another_size(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", build("test_vit", 64).body, {})
    assert logits(build("test_vit", 96, weights=tmp_path / "w.safetensors"), 96).shape == (2, 7)


def test_a_mixer_of_another_size_is_refused() -> None:
    with torch.device("meta"):
        small = timm.create_model("mixer_b16_224", num_classes=7, img_size=32)
        large = timm.create_model("mixer_b16_224", num_classes=7, img_size=64)
    with pytest.raises(DataError, match=r"another model or size.*mlp_tokens"):
        load_fitting(large, Weights("w.safetensors", small.state_dict()), ("head.weight", "head.bias"))


def test_pretrained_without_a_network_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere(*_: object) -> None:
        raise socket.gaierror("no name service")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("test_resnet", "alexnet"):
        with pytest.raises(DataError, match="--weights") as error:
            build(name, 64, pretrained=True)
        assert name in str(error.value)


def test_pretrained_behind_a_socks_proxy_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """httpx, the client of the hub, raises an ImportError without the package for such proxies."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    huggingface_hub.close_session()  # of an earlier download, with other proxies
    with pytest.raises(DataError, match=r"weights of test_resnet could not be downloaded .*--weights"):
        build("test_resnet", 64, pretrained=True)


# ------------------------------------------------------------------ what the optimizer sees


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_no_weight_decay_on_biases_norms_and_positions(name: str) -> None:
    net = build(name)
    groups = models.parameter_groups(net, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    names = {id(p): n for n, p in net.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            own = names[id(parameter)]
            exempt = parameter.ndim <= 1 or own.endswith((".bias", "pos_embed", "cls_token"))
            assert group["weight_decay"] == (0.0 if exempt else 0.1), own


def test_cost_counts_a_known_network() -> None:
    parameters, flops = models.cost("resnet18", 224, 1000)
    assert parameters == 11_689_512  # torchvision's documentation of resnet18
    assert flops == pytest.approx(2 * 1.814e9, rel=0.01)  # its 1.81 GFLOPS there are multiply-adds


def test_stochastic_depth_leaves_out_branches_in_training_alone() -> None:
    torch.manual_seed(0)
    net = models.build("test_vit", 32, 7, MEAN, STD, drop_path=0.9)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    colour = torch.eye(3, 4).expand(8, 3, 4)
    trained = [net.train()(images, colour) for _ in range(2)]
    tested = [net.eval()(images, colour) for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*tested)


def test_models_without_the_needed_parts_are_refused_by_name() -> None:
    for name in ("alexnet", "vgg11"):
        with pytest.raises(UsageError, match=f"--drop-path: {name} cannot leave out residual branches"):
            models.check_layers(name, 0.1, None)
    with pytest.raises(UsageError, match="--layer-decay: the layers of alexnet have no known order"):
        models.check_layers("alexnet", 0.0, 0.75)
    for name in ("resnet18", "vit_b16", "mixer_b16"):
        models.check_layers(name, 0.1, 0.75)
    models.check_layers("alexnet", 0.0, 1.0)
