"""The training step against the same step written with plain PyTorch, bit for bit on the CPU; and the losses."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.support.train_runs import small, step_of
from train.compiling import example
from train.config import LOSSES, Config
from train.distributed import World
from train.loss import Loss
from train.step import TrainingStep, leaving_no_trace

COUNTS = [30, 40, 100, 10, 90, 600, 20]
CPU = torch.device("cpu")
SGD, ADAMW = {"model": "test_resnet"}, {"model": "test_vit"}


def config(**changes: object) -> Config:
    return small("no data", batch_size=8, **changes)  # type: ignore[arg-type]


def prior() -> torch.Tensor:
    return torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)


def by_hand(step: TrainingStep, lr: float, clip: float | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Five steps on one batch with the optimizer of a copy of the step's network; the losses, and the weights."""
    net = copy.deepcopy(step.net)
    known = {id(parameter): name for name, parameter in step.net.named_parameters()}
    own = dict(net.named_parameters())
    groups = [
        {"params": [own[known[id(p)]] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in step.optimizer.param_groups
    ]
    if isinstance(step.optimizer, torch.optim.SGD):
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    images, colour, labels = example(8, 32, CPU)
    losses = []
    for _ in range(5):
        logits = net(images, colour) + prior().log().float()
        loss = F.cross_entropy(logits, labels, reduction="sum") / 8
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net.state_dict()


@pytest.mark.parametrize(("changes", "clip"), [(SGD, None), (SGD | {"clip": 0.1}, 0.1), (ADAMW, 1.0)])
def test_a_step_equals_plain_pytorch_bit_for_bit(changes: dict, clip: float | None) -> None:
    step = step_of(config(**changes))
    losses, weights = by_hand(step, 0.01, clip)
    batch = example(8, 32, CPU)
    assert [step(*batch, lr=0.01).item() for _ in range(5)] == losses
    assert all(torch.equal(weights[name], value) for name, value in step.net.state_dict().items())
    assert step.done == 5
    assert all(parameter.grad is None for parameter in step.net.parameters())


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_muon_makes_the_updates_of_matrices_orthogonal_and_as_large_as_adamws(model: str) -> None:
    step = step_of(config(model=model, optimizer="muon", lr=0.01, weight_decay=0.0))
    images, colour, _ = example(8, 32, CPU)
    batch = images, colour, torch.arange(8) % 7
    step(*batch, lr=0.01)  # before it, the last normalisation of a block is 0, and so are gradients
    before = {name: weight.detach().clone() for name, weight in step.net.named_parameters()}
    step(*batch, lr=0.01)
    matrices = 0
    for name, weight in step.net.named_parameters():
        update = weight.detach() - before[name]
        assert update.any()
        if weight.ndim > 1 and len(weight) > 1:
            matrices += 1
            sizes = torch.linalg.svdvals(update.flatten(1)) / (0.01 * 0.2 * max(update.flatten(1).shape) ** 0.5)
            assert sizes.max() < 1.3
            assert sizes[:6].min() > 0.7  # a gradient of seven classes may have no higher rank
    assert matrices > 5


def test_layers_learn_the_more_the_later_they_come() -> None:
    """Against SGD's own update: the rate of each layer, from the patches to the classifier."""
    for decay in (1.0, 0.5):
        step = step_of(config(model="test_vit", optimizer="sgd-nesterov", lr=0.1, weight_decay=0.0, layer_decay=decay))
        before = {name: weight.detach().clone() for name, weight in step.net.named_parameters()}
        step.clip = None
        step.backward(*example(8, 32, CPU))
        gradients = {name: weight.grad.clone() for name, weight in step.net.named_parameters()}  # type: ignore[union-attr]
        step.update(0.1)
        blocks = len(step.net.body.blocks)  # type: ignore[arg-type]
        last = f"body.blocks.{blocks - 1}.mlp.fc1.weight"
        for name, layers in (("body.head.weight", 0), (last, 1), ("body.patch_embed.proj.bias", blocks + 1)):
            moved = step.net.get_parameter(name) - before[name]
            torch.testing.assert_close(moved, -0.1 * decay**layers * 1.9 * gradients[name], rtol=1e-3, atol=1e-7)


def test_clipping_shortens_the_gradient_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer, *_: norms.append(norm(optimizer)))

    def norm(optimizer: torch.optim.Optimizer) -> float:
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        return float(torch.cat(grads).norm())

    for clip in (None, 0.05, 1e6, 0.0):
        step_of(config(clip=clip))(*example(8, 32, CPU), lr=0.1)
    assert norms[0] == norms[2] == norms[3] > 0.05
    assert norms[1] == pytest.approx(0.05, rel=1e-4)


def test_the_average_follows_its_definition() -> None:
    """decay · average + (1 − decay) · weights, with the decay of (1 + t) / (10 + t) at first; buffers are copied."""
    step = step_of(config(ema=0.25))
    expected = {name: p.detach().double() for name, p in step.net.named_parameters()}
    for t in range(4):
        step(*example(8, 32, CPU), lr=0.05)
        decay = min(0.25, (1 + t) / (10 + t))
        for name, weight in step.net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
    assert step.reported is not step.net
    for name, value in step.reported.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
    for average, buffer in zip(step.reported.buffers(), step.net.buffers(), strict=True):
        assert torch.equal(average, buffer)
    assert step_of(config()).average is None


def test_autocast_computes_in_bfloat16_and_keeps_weights_and_loss_in_float32() -> None:
    seen = []
    for precision in ("fp32", "bf16"):
        step = step_of(config(), precision)
        step.net.body.conv1.register_forward_hook(lambda *args: seen.append(args[2].dtype))  # type: ignore[union-attr]
        seen.append(step(*example(8, 32, CPU), lr=0.01))
        assert {p.dtype for p in step.net.parameters()} == {torch.float32}
    assert (seen[0], seen[2]) == (torch.float32, torch.bfloat16)
    assert seen[1].dtype == seen[3].dtype == torch.float32
    assert seen[1] != seen[3]
    torch.testing.assert_close(seen[1], seen[3], rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_the_mean_over_the_global_batch(kind: str) -> None:
    """Two slices, as of two processes, add up to the loss of the whole batch; class weights divide by their sum."""
    batch = example(8, 32, CPU)
    step = step_of(config(loss=kind, model="test_vit"))
    whole = step.backward(*batch)
    weights = step.loss(torch.zeros(8, 7), batch[2])[1]

    class Two(World):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            assert weights is not None
            return values.copy_(weights)

    step.world = Two()
    parts = [step.backward(*(part[a:b] for part in batch)) for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(sum(parts), whole)


def test_a_step_goes_on_from_its_state() -> None:
    batch = example(8, 32, CPU)
    whole, first, second = (step_of(config(ema=0.9, model="test_vit")) for _ in range(3))
    for _ in range(4):
        whole(*batch, lr=0.01)
    for _ in range(2):
        first(*batch, lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()), first.done)
    for _ in range(2):
        second(*batch, lr=0.01)
    for a, b in ((whole.net, second.net), (whole.reported, second.reported)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("changes", [SGD, ADAMW])
@pytest.mark.parametrize("done", [0, 2])
def test_timing_leaves_no_trace(changes: dict, done: int) -> None:
    """Steps in between change nothing, and every tensor stays where it is: weights, average, optimizer, buffers."""
    batch = example(8, 32, CPU)
    step, other = (step_of(config(ema=0.9, **changes)) for _ in range(2))
    for _ in range(done):
        assert step(*batch, lr=0.05) == other(*batch, lr=0.05)
    random_state = torch.get_rng_state()
    places = [tensor.data_ptr() for tensor in (*step.net.parameters(), *step.net.buffers())]
    with pytest.raises(KeyError), leaving_no_trace(step):
        step(*batch, lr=0.05)
        step.backward(*batch)
        torch.rand(3)
        raise KeyError
    assert step.done == done and all(parameter.grad is None for parameter in step.net.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert places == [tensor.data_ptr() for tensor in (*step.net.parameters(), *step.net.buffers())]
    for _ in range(3):
        assert step(*batch, lr=0.05) == other(*batch, lr=0.05)
    for a, b in ((step.net, other.net), (step.reported, other.reported)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ------------------------------------------------------------------ the loss alone


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 7, generator=generator), torch.arange(12) % 7


def mean(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    total, weight = loss(logits, labels)
    return total / (len(labels) if weight is None else weight)


def test_the_losses_against_their_definitions() -> None:
    logits, labels = logits_and_labels()
    torch.testing.assert_close(mean(Loss("plain", COUNTS, CPU), logits, labels), F.cross_entropy(logits, labels))
    adjusted = -((logits + prior().float().log()).softmax(1)[range(12), labels]).log().mean()
    torch.testing.assert_close(mean(Loss("logit-adjusted", COUNTS, CPU), logits, labels), adjusted)
    weighted = F.cross_entropy(logits, labels, weight=1 / prior().float())
    torch.testing.assert_close(mean(Loss("class-weighted", COUNTS, CPU), logits, labels), weighted)
    p = logits.softmax(1)[range(12), labels]
    torch.testing.assert_close(mean(Loss("focal", COUNTS, CPU), logits, labels), -((1 - p) ** 2 * p.log()).mean())


def test_a_smoothed_target_is_shared_by_the_classes_that_have_images() -> None:
    logits, labels = logits_and_labels()
    target = 0.8 * F.one_hot(labels, 7) + 0.2 / 7
    torch.testing.assert_close(mean(Loss("plain", COUNTS, CPU, 0.2), logits, labels), F.cross_entropy(logits, target))
    shifted = logits + prior().float().log()
    adjusted = mean(Loss("logit-adjusted", COUNTS, CPU, 0.2), logits, labels)
    torch.testing.assert_close(adjusted, F.cross_entropy(shifted, target))
    rare = prior().reciprocal().float()
    weighted = -(target * rare * logits.log_softmax(1)).sum() / rare[labels].sum()
    torch.testing.assert_close(mean(Loss("class-weighted", COUNTS, CPU, 0.2), logits, labels), weighted)
    few = mean(Loss("plain", [*COUNTS[:6], 0], CPU, 0.2), logits[:6], labels[:6])
    torch.testing.assert_close(few, -(target[:6] * logits[:6].log_softmax(1))[:, :6].sum() / 6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_class_without_images_does_no_harm(kind: str, smoothing: float) -> None:
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    value = mean(Loss(kind, [*COUNTS[:6], 0], CPU, smoothing), logits[:6], labels[:6])
    assert value < 20
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
