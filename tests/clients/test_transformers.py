"""A Loader under Hugging Face's Trainer, through a DataLoader that makes dictionaries of its batches: the example."""

import runpy
import sys

import pytest
import torch

from tests.support.clients import EPOCH, ROOT, Tiny, make, two_processes

transformers = pytest.importorskip("transformers", reason="needs the extra `clients`")
pytest.importorskip("accelerate", reason="needs the extra `clients`")

EXAMPLE = str(ROOT / "examples" / "with_transformers.py")


class Net(Tiny):
    """Writes down the colour maps that it sees in training, which differ from sample to sample."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images, colour, labels):
        if self.training:
            self.seen.append(colour.clone())
        logits = super().forward(colour.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(shards, folder, until, resume=None, val=None, **options):
    example = runpy.run_path(EXAMPLE)
    args = transformers.TrainingArguments(
        str(folder), num_train_epochs=until, report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    net = Net()
    trainer = example["LesionTrainer"](
        net,
        args,
        train_dataset=make(shards),
        eval_dataset=val,
        compute_metrics=example["accuracy"],
        callbacks=[example["SetEpoch"]()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, net.seen


def colours(shards, count):
    """The colour maps of all batches of the first epochs."""
    loader, found = make(shards), []
    for epoch in range(count):
        loader.set_epoch(epoch)
        found += [batch.colour for batch in loader]
    return found


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_each_batch_comes_once_and_evaluation_counts_each_image_once(tiny_shards, tmp_path):
    val = make(tiny_shards, "val", batch_size=7)  # the last batch is padded
    trainer, seen = train(tiny_shards, tmp_path, 3, val=val, save_strategy="no")
    assert same(seen, colours(tiny_shards, 3))
    given = []
    accuracy, trainer.compute_metrics = trainer.compute_metrics, lambda answers: given.append(answers) or {}
    trainer.evaluate()
    labels, counts = given[0].label_ids, given[0].label_ids != -100
    assert labels[counts].tolist() == val.selection.labels.tolist() and not counts.all()
    right = (given[0].predictions.argmax(1) == labels)[counts].mean()
    assert accuracy(given[0])["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("stop", [4, EPOCH, EPOCH + 5])
def test_a_checkpoint_of_any_step_goes_on_with_the_next_batch(tiny_shards, tmp_path, stop):
    everything = colours(tiny_shards, 3)
    _, seen = train(tiny_shards, tmp_path, 3, save_steps=stop)
    assert same(seen, everything)
    _, resumed = train(tiny_shards, tmp_path, 3, tmp_path / f"checkpoint-{stop}", save_strategy="no")
    assert same(resumed, everything[stop:])


@pytest.mark.slow
def test_two_processes_share_each_batch(tiny_shards, tmp_path):
    two_processes(__file__, tiny_shards, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same([torch.cat(pair) for pair in zip(*parts, strict=True)], colours(tiny_shards, 2))


@pytest.mark.slow
def test_the_example_trains_and_goes_on(tiny_shards, tmp_path):
    main = runpy.run_path(EXAMPLE)["main"]
    options = {"batch_size": 8, "resolution": 32}
    for until in (1, 2):
        trainer = main(str(tiny_shards), str(tmp_path), epochs=until, **options)
        assert trainer.state.global_step == until * EPOCH
        (right,) = [24 * line["eval_accuracy"] for line in trainer.state.log_history[-2:] if "eval_accuracy" in line]
        assert abs(right - round(right)) < 1e-4


if __name__ == "__main__":
    shards, folder = sys.argv[1:]
    trainer, seen = train(shards, folder, 2, save_strategy="no")
    torch.save(seen, f"{folder}/{trainer.args.process_index}.pt")
