"""`python -m shards info|verify|show SET`: what a shard set holds, whether it is complete, and what a batch looks like.

$ python -m shards verify data/shards
data/shards: 6 shards and 10,015 samples are whole

A SET is a folder, or an address in a store such as s3://bucket/set. `push` and `pull` copy a set from one to the other;
`card` describes it for catalogues. `overlap` lists the images that two sets share.
"""

import json
from pathlib import Path

import click

from shards.common import cli
from shards.common.errors import DataError, UsageError
from shards.format import INDEX_TYPES
from shards.store import Place, is_address


@click.group(cls=cli.Group)
def main() -> None:
    """Look at a packed shard set, copy it, and describe it."""


@main.command()
@click.argument("folder", metavar="SET", type=Place())
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, for programs.")
def info(folder: str | Path, as_json: bool) -> None:
    """Print the settings, sizes and counts of SET."""
    from shards.shardset import ShardSet

    with ShardSet(folder) as data:
        manifest = data.manifest
        columns = {field.name: str(field.type) for field in data.table.schema}
        if as_json:
            about = json.loads(manifest.to_json()) | {"samples": len(data), "columns": columns}
            click.echo(json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False))
            return
        encode, sides = manifest.encode, [data.column(name) for name in ("width", "height")]
        click.echo(f"{folder}: format {manifest.format_version}, {len(data)} samples")
        click.echo(
            f"write mode {encode.write_mode}, jpeg quality {encode.jpeg_quality}, chroma {encode.subsampling}, "
            f"images {min(sides[0])}x{min(sides[1])} to {max(sides[0])}x{max(sides[1])} px"
        )
        click.echo(f"split {manifest.split}")
        for split in manifest.counts:
            shards = [shard.bytes for shard in manifest.shards if shard.split == split]
            click.echo(f"{split}: {len(shards)} shards, {sum(shards) / 1e6:.1f} MB")
        if not manifest.classes:
            click.echo("no labels: the set is for prediction alone")
        click.echo(f"{manifest.table()}\ngroups from {', '.join(manifest.group) or 'no column: each image is its own'}")
        if further := [name for name in columns if name not in INDEX_TYPES]:
            click.echo(f"columns of the source: {', '.join(further)}")
        for name, members in manifest.classes.sets.items():
            click.echo(f"{name}: {', '.join(members)}")
        click.echo(f"licence: {manifest.licence}\ncite: {manifest.citation}")


@main.command()
@click.argument("folder", metavar="SET", type=Place())
def verify(folder: str | Path) -> None:
    """Read every byte of SET and compare all checksums.

    Exit code 1 if a file is damaged, missing or not part of the set.
    """
    from shards.common.progress import Progress
    from shards.format import MANIFEST
    from shards.shardset import ShardSet

    with ShardSet(folder) as data:
        sizes, damage = {shard.file: shard.bytes for shard in data.manifest.shards}, []
        with Progress("verifying", sum(sizes.values()), "bytes") as bar:
            for name, problems in data.verify():
                bar.advance(sizes.get(name, 0))
                damage += [f"{name}: {problem}" for problem in problems]
        for line in damage:
            click.echo(line, err=True)
        if damage:
            raise DataError(f"{folder}: {len(damage)} problems, each with what to do about it (above)")
        click.echo(f"{folder}: {len(sizes)} shards and {len(data):,} samples are whole")
        if data.manifest.manifest_sha256 is None:
            click.echo(
                f"note: {MANIFEST} is of an older release and has no checksum: mean, std and encode settings cannot "
                "be checked"
            )


@main.command()
@click.argument("folder", metavar="SET", type=Place())
@click.option(
    "--out",
    default="batch.png",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="PNG to write. An older one is replaced.",
)
@click.option("--images", default=24, show_default=True, help="Number of images. The picture has a row for each eight.")
@click.option(
    "--resolution", default=128, show_default=True, help="Side of each image in px. A larger one makes a larger file."
)
@click.option("--eval", "evaluation", is_flag=True, help="Show images as in evaluation, not augmented.")
@click.option(
    "--seed", default=0, show_default=True, help="Seed of order and augmentation. Another seed shows other images."
)
def show(folder: str | Path, out: Path, images: int, resolution: int, evaluation: bool, seed: int) -> None:
    """Draw the first training batch of SET, with colour augmentation and each image's diagnosis."""
    import cv2
    import numpy as np

    from shards.common.files import write_durably
    from shards.loader import Loader
    from shards.shardset import ShardSet

    with ShardSet(folder) as data:
        selection = data.select("train")
        options = {"batch_size": images, "resolution": resolution, "train": not evaluation, "seed": seed}
        loader = Loader(selection, engine="native", **options)
        batch = next(iter(loader))
        loader.close()
        rgb = batch.images.permute(0, 2, 3, 1).numpy() / 255
        colour = batch.colour.numpy()
        shown = np.einsum("ncd,nhwd->nhwc", colour[:, :, :3], rgb) + colour[:, None, None, :, 3]
        tiles = np.clip(np.rint(shown * 255), 0, 255).astype(np.uint8)
        for tile, label in zip(tiles, batch.labels.tolist(), strict=True):
            name, scale = data.manifest.classes.names[label], resolution / 300
            for ink, width in ((0, 4), (255, 1)):
                place = (resolution // 24, resolution - resolution // 16)
                cv2.putText(tile, name, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (ink,) * 3, width, cv2.LINE_AA)
    columns = min(images, 8)
    blank = np.zeros((-images % columns, resolution, resolution, 3), np.uint8)
    rows = np.concatenate([tiles, blank]).reshape(-1, columns, resolution, resolution, 3)
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    done, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    if not done:
        raise DataError(f"{out}: OpenCV could not encode a picture of {sheet.shape[1]}x{sheet.shape[0]} px")
    write_durably(out, png.tobytes())
    click.echo(f"{out}: {images} images, {sheet.shape[1]}x{sheet.shape[0]} px")


@main.command()
@click.argument("first", type=Place())
@click.argument("second", type=Place())
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="CSV of the pairs. Without it they are printed."
)
def overlap(first: str | Path, second: str | Path, out: Path | None) -> None:
    """List the images that are in both sets, FIRST and SECOND.

    Copies of other sizes, quality or colours are found; turned, mirrored and cut ones are not.
    """
    from shards.common.files import write_durably
    from shards.common.progress import Progress
    from shards.duplicates import copies_csv
    from shards.duplicates import overlap as shared
    from shards.shardset import ShardSet

    with ShardSet(first) as one, ShardSet(second) as other:
        with Progress("comparing", len(one) + len(other), "images") as bar:
            copies = shared(one, other, bar.advance)
        mine, theirs = one.column("image_id"), other.column("image_id")
        table = copies_csv(copies, mine.tolist(), theirs.tolist())
        if out is None:
            click.echo(table.decode(), nl=False)
        else:
            write_durably(out, table)
        images = [len({copy[side] for copy in copies}) for side in (0, 1)]
        click.echo(
            f"{images[0]:,} of {len(one):,} images of {first} are in {second}, as {images[1]:,} of {len(other):,}",
            err=True,
        )


_overwrite = click.option("--overwrite", is_flag=True, help="Replace the set that is there.")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("address", type=Place())
@_overwrite
def push(folder: Path, address: str | Path, overwrite: bool) -> None:
    """Copy the set in FOLDER to ADDRESS in a store, such as s3://bucket/set.

    Every file is checked before it is sent. After an interruption, run it again: what has arrived is not sent twice.
    """
    from shards import copy

    if not is_address(address):
        raise UsageError(f"{address}: is no address in a store, such as s3://bucket/set; copy to a folder with cp")
    manifest = copy.push(folder, address, overwrite)
    click.echo(f"{address}: {len(manifest.shards)} shards are there; `{cli.typed('shards')} verify` reads them back")


@main.command()
@click.argument("address", type=Place())
@click.argument("folder", type=click.Path(path_type=Path))
@_overwrite
def pull(address: str | Path, folder: Path, overwrite: bool) -> None:
    """Copy the set at ADDRESS in a store to the new FOLDER.

    Every file is checked. After an interruption, run it again: what has arrived is not fetched twice.
    """
    from shards import copy

    if not is_address(address):
        raise UsageError(f"{address}: is no address in a store, such as s3://bucket/set; copy a folder with cp")
    manifest = copy.pull(address, folder, overwrite)
    click.echo(f"{folder}: {len(manifest.shards)} shards, whole")


@main.command()
@click.argument("folder", metavar="SET", type=Place())
@click.option("--overwrite", is_flag=True, help="Replace files of these names that say something else.")
def card(folder: str | Path, overwrite: bool) -> None:
    """Write README.md, a dataset card for the Hugging Face Hub, and croissant.json, Croissant metadata, into SET."""
    from shards.card import cards
    from shards.common.files import write_durably
    from shards.shardset import ShardSet
    from shards.store import Store

    with ShardSet(folder) as data:
        content = cards(data)
        store = Store(data.address) if is_address(folder) else None
        there = store.names() if store else {file.name for file in data.path.iterdir()}
        for name, text in content.items():
            if name in there and not overwrite:
                before = store.read(name, 1 << 26) if store else (data.path / name).read_bytes()
                if before != text:
                    raise DataError(f"{data.address}/{name}: says something else; add --overwrite to replace it")
        for name, text in content.items():
            if store:
                store.write(name, text)
            else:
                write_durably(data.path / name, text)
        click.echo(f"{data.address}: {' and '.join(content)} written")


if __name__ == "__main__":
    cli.run(main)
