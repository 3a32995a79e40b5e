"""The cells of a study: models × fractions × seeds, one run each. Pure functions from lists to configurations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from shards.common.errors import UsageError
from train.config import Config, read_fraction

EIGHT = ("alexnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vit_b16", "mixer_b16")
"""What `--models all` stands for."""

FRACTIONS = tuple(2.0**-k for k in range(6, -1, -1))
"""1/64, 1/32 … 1: seven sizes, evenly spaced on a logarithmic axis."""

BUDGETS = ("epochs", "steps")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    config: unresolved, as for train.run. n_train: number of training images. steps: number of optimizer steps. note:
    what the grid changed in the settings, and why; may be empty. prefix: of the folder's name, if the names would
    otherwise be equal.
    """

    config: Config
    n_train: int
    steps: int
    note: str = ""
    prefix: str = ""

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return self.prefix + cell_name(self.config)

    @property
    def images(self) -> int:
        """Training images that it sees, repeats included."""
        return self.steps * self.config.batch_size


def cell_name(config: Config) -> str:
    """The folder of a run: `resnet18_f0.25_s0_u0` (fraction, seed, subset seed)."""
    model = config.model.replace("/", "-")
    return f"{model}_f{config.fraction:.6g}_s{config.seed}_u{config.subset_seed}"


def parse_models(text: str) -> list[str]:
    """`a,b` or `all`. Raises UsageError for an empty list or a repeated name."""
    names = list(EIGHT) if text.strip() == "all" else [part.strip() for part in text.split(",") if part.strip()]
    return _distinct(names, "--models", "names of models, or all")


def parse_fractions(text: str) -> list[float]:
    """`0.1,1/4,1` as ascending numbers in (0, 1]. Raises UsageError for anything else."""
    found = [read_fraction(part.strip(), "--fractions") for part in text.split(",")]
    return sorted(_distinct(found, "--fractions", "numbers in (0, 1]"))


def parse_seeds(text: str, option: str) -> list[int]:
    """`0,1,2` as whole numbers of 0 or more. Raises UsageError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong:
        raise UsageError(f"{option} '{wrong[0]}' is not a whole number of 0 or more")
    return _distinct([int(part) for part in parts], option, "whole numbers")


def _distinct(values: list, option: str, what: str) -> list:
    if not values:
        raise UsageError(f"{option} is empty: give {what}, separated by commas")
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"{option}: {value} is given more than once")
    return values


def seed_pairs(fraction: float, seeds: Sequence[int], subset_seeds: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    """The (seed, subset seed) pairs of a fraction.

    Without subset seeds both vary together, so that the spread of the results includes the sampling of the data. With
    them, every seed is combined with every subset seed, except on the whole training split, where all subsets are the
    same.
    """
    for seed in seeds:
        for subset_seed in (seed,) if subset_seeds is None else subset_seeds if fraction < 1.0 else subset_seeds[:1]:
            yield seed, subset_seed


def fitting_batch(batch_size: int, images: int) -> int:
    """The batch size, or the largest power of two that does not exceed the number of training images.

    A power of two, because subsets of one fraction differ by a few images, and each batch size is compiled separately.
    """
    return batch_size if batch_size <= images else 1 << (images.bit_length() - 1)


def grid_cells(
    base: Config,
    models: Sequence[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
    subset_seeds: Sequence[int] | None,
    budget: str,
    count: Callable[[float, int], int],
) -> list[Cell]:
    """Every cell of the grid, model by model, the large fractions of a model first.

    base: the settings that all cells share. budget: `epochs`, or `steps`: then every fraction takes the optimizer steps
    that `base.epochs` need on the whole training split (or `base.steps`). It is also evaluated about as often: its
    epochs are short, and an evaluation after each would take longer than the training. count: (fraction, subset seed)
    → training images. Large fractions come first because they show early whether memory is sufficient, and how long
    the grid takes. Raises UsageError if a fraction leaves too few images to train on.
    """
    if budget not in BUDGETS:
        raise UsageError(f"--budget '{budget}' is unknown: use one of {', '.join(BUDGETS)}")
    whole = count(1.0, seeds[0] if subset_seeds is None else subset_seeds[0])
    whole_epoch = max(whole // fitting_batch(base.batch_size, whole), 1)
    equal = base.steps or base.epochs * whole_epoch
    cells = []
    for model in models:
        for fraction in sorted(fractions, reverse=True):
            for seed, subset_seed in seed_pairs(fraction, seeds, subset_seeds):
                images = count(fraction, subset_seed)
                if images < 2:
                    raise UsageError(f"--fractions {fraction:g} leaves {images} training image: choose a larger one")
                batch = fitting_batch(base.batch_size, images)
                note = "" if batch == base.batch_size else (
                    f"batch size {base.batch_size} → {batch}: the fraction holds {images} images"
                )  # fmt: skip
                epoch = images // batch
                steps = equal if budget == "steps" else base.steps or base.epochs * epoch
                config = replace(
                    base,
                    model=model,
                    fraction=fraction,
                    seed=seed,
                    subset_seed=subset_seed,
                    batch_size=batch,
                    steps=equal if budget == "steps" else base.steps,
                    eval_epochs=(
                        max(1, round(base.eval_epochs * whole_epoch / epoch)) if budget == "steps" else base.eval_epochs
                    ),
                )
                cells.append(Cell(config, images, steps, note))
    return cells
