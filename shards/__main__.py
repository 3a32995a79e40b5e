"""`python -m shards info|verify DIR`: what a shard set holds, and whether every byte of it is whole.

$ python -m shards verify data/shards
data/shards: 6 shards and 10,015 samples are whole
"""

from pathlib import Path

import click

from shards import cli
from shards.errors import DataError


@click.group()
def main() -> None:
    """Look at a packed shard set."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def info(folder: Path) -> None:
    """Print the settings, sizes and counts of the set in FOLDER."""
    from rich.console import Console
    from rich.table import Table

    from shards.format import SPLITS
    from shards.shardset import ShardSet

    with ShardSet(folder) as data:
        manifest = data.manifest
        table = Table("split", *manifest.classes, "samples", "shards", "MB")
        for column in table.columns[1:]:
            column.justify = "right"
        for split in filter(manifest.counts.__contains__, SPLITS):
            counts = manifest.counts[split]
            shards = [shard for shard in manifest.shards if shard.split == split]
            size = sum(shard.bytes for shard in shards) / 1e6
            cells = [str(counts[dx]) for dx in manifest.classes]
            table.add_row(split, *cells, str(sum(counts.values())), str(len(shards)), f"{size:.1f}")
        encode, sides = manifest.encode, [data.column(name) for name in ("width", "height")]
        click.echo(f"{folder}: format {manifest.format_version}, {len(data)} samples")
        click.echo(
            f"write mode {encode.write_mode}, jpeg quality {encode.jpeg_quality}, chroma {encode.subsampling}, "
            f"images {min(sides[0])}x{min(sides[1])} to {max(sides[0])}x{max(sides[1])} px"
        )
        click.echo(f"split {manifest.split}")
        Console().print(table)
        click.echo(f"licence: {manifest.licence}\ncite: {manifest.citation}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Read every byte of the set in FOLDER and compare all checksums. Exit code 1 where something is damaged."""
    from rich.progress import track

    from shards.shardset import ShardSet

    with ShardSet(folder) as data:
        files = len(data.manifest.shards)
        damage = [
            f"{name}: {wrong}"
            for name, problems in track(data.verify(), "verifying", total=files, transient=True)
            for wrong in problems
        ]
        for line in damage:
            click.echo(line, err=True)
        if damage:
            raise DataError(f"{folder}: {len(damage)} of its parts are damaged (above); pack the set again")
        click.echo(f"{folder}: {files} shards and {len(data):,} samples are whole")


if __name__ == "__main__":
    cli.run(main)
