"""Training with Hugging Face Accelerate: accelerate launch examples/with_accelerate.py data/shards

A run that was stopped goes on with the next batch when it is started again. `prepare` gives the loader back as it is:
its batches are on the device already, and each process loads its part of every batch.
"""

import sys
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from shards import Loader, ShardSet
from train.head import InputHead
from train.models import Classifier


def main(
    shards: str,
    out: str = "runs/accelerate",
    *,
    batch_size: int = 64,
    resolution: int = 224,
    epochs: int = 10,
    save_steps: int = 100,
) -> float:
    """Train, or go on from the state in `out`. Returns the accuracy on the validation split."""
    accelerator, data, state = Accelerator(), ShardSet(shards), Path(out) / "state"
    options = {"batch_size": batch_size, "resolution": resolution, "device": accelerator.device}
    train = Loader(data.select("train"), **options)
    val = Loader(data.select("val"), train=False, **options)

    head = InputHead(data.manifest.mean, data.manifest.std)
    net = Classifier(head, timm.create_model("resnet18", num_classes=len(data.manifest.classes)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net, optimizer, train, val = accelerator.prepare(net, optimizer, train, val)

    accelerator.register_for_checkpointing(train)  # its position
    if state.exists():
        accelerator.load_state(str(state))
    while train.epoch < epochs:
        net.train()
        for step, batch in enumerate(train, 1):
            loss = cross_entropy(net(batch.images, batch.colour), batch.labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % save_steps == 0:
                accelerator.save_state(str(state))
        accelerator.save_state(str(state))

    net.eval()
    right = torch.zeros((), device=accelerator.device)
    with torch.inference_mode():
        for images, labels, _, colour, mask in val:
            right += (net(images, colour).argmax(1) == labels)[mask].sum()
    accuracy = float(accelerator.reduce(right)) / len(val.selection)
    accelerator.print(f"val accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
