"""What describes a shard set to people and catalogues: a Hugging Face dataset card, and Croissant metadata.

The card is README.md with YAML front matter (huggingface.co/docs/hub/datasets-cards); croissant.json is JSON-LD of
Croissant 1.1 (docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html).
"""

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.format import CARDS, FORMAT_VERSION, INDEX, SPLITS, Manifest

if TYPE_CHECKING:
    import pyarrow as pa

    from shards.shardset import ShardSet

_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
_MEMBERS = {"jpg": ("jpg", "image/jpeg", "sc:ImageObject"), "raw": ("npy", "application/octet-stream", "sc:Text")}
"""By encoding: the suffix of a payload in the tars, its format, and Croissant's type of its content."""
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification of Croissant 1.1 gives."""


def cards(data: "ShardSet") -> dict[str, bytes]:
    """The content of both files of a set, by name. They depend on the set alone."""
    croissant = json.dumps(_croissant(data), indent=2, ensure_ascii=False)
    return dict(zip(CARDS, (_readme(data).encode(), f"{croissant}\n".encode()), strict=True))


def _name(manifest: Manifest) -> str:
    """What the set is called: as its source."""
    source = manifest.source
    return str(source.get("dataset") or source.get("name") or "Image set")


def _licence(text: str) -> tuple[str, str]:
    """The Hub's name of a licence, `other` for one that it has not, and the licence's address or its text."""
    if match := re.fullmatch(r"CC[ -](BY(?:-NC)?(?:-SA|-ND)?)[ -](\d\.\d)", text):
        kind, version = match[1].lower(), match[2]
        return f"cc-{kind}-{version}", f"https://creativecommons.org/licenses/{kind}/{version}/"
    if re.fullmatch(r"CC0([ -]1\.0)?", text):
        return "cc0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/"
    if text == "Apache-2.0":
        return "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"
    return "other", text


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table in Markdown."""
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def _readme(data: "ShardSet") -> str:
    """The dataset card."""
    manifest, encode = data.manifest, data.manifest.encode
    licence = _licence(manifest.licence)[0]
    size = next((words for most, words in _SIZES if len(data) < most), "n>10M")
    files = {split: [shard.file for shard in manifest.shards if shard.split == split] for split in SPLITS}
    front = [
        f"pretty_name: {json.dumps(_name(manifest), ensure_ascii=False)}",
        f"license: {licence}",
        *([f"license_name: {json.dumps(manifest.licence, ensure_ascii=False)}"] if licence == "other" else []),
        "task_categories: [image-classification]",
        f"size_categories: [{size}]",
        "tags: [webdataset, croissant, dermscale]",
    ]
    uniform = len(set(data.column("encoding"))) == 1
    if uniform:  # `datasets` wants the same members in each sample
        front += ["configs:", "- config_name: default", "  data_files:"]
        front += [f"  - {{split: {_HUB_SPLITS[s]}, path: {json.dumps(names)}}}" for s, names in files.items() if names]
    sides = [data.column(name) for name in ("width", "height")]
    splits = list(manifest.counts)
    classes: list[tuple[Any, ...]] = [
        (label, name, manifest.classes.long_names.get(name, ""), *(manifest.counts[split][name] for split in splits))
        for label, name in enumerate(manifest.classes.names)
    ]
    samples = [sum(shard.samples for shard in manifest.shards if shard.split == split) for split in splits]
    classes.append(("", "all", "", *samples))
    sizes = f"Images have {min(sides[0])}×{min(sides[1])} to {max(sides[0])}×{max(sides[1])} px."
    stored = f"They are stored as {encode.write_mode}, JPEG quality {encode.jpeg_quality}, chroma {encode.subsampling}."
    group = " and ".join(manifest.group) or "image"
    divided = "The split is by image." if manifest.split.get("unit") == "image" else f"No {group} is in two splits."
    fields = [(field.name, field.type) for field in data.table.schema]
    return f"""---
{chr(10).join(front)}
---

# {_name(manifest)}

{len(data):,} images in webdataset tars, packed by dermscale (format {manifest.format_version}).
{sizes}
{stored}

## Classes and splits

{_table(("label", "class", "name", *splits), classes)}

{divided}

## Fields

Each sample of a tar is an image (`.jpg`, or `.npy` of uint8), its label if it has one (`.cls`), and metadata (`.json`).
`{INDEX}` has a row for each sample:

{_table(("column", "type"), fields)}

## Use

```python
{_example(splits[0], files["train"] if uniform else [])}
```

## Licence and citation

{manifest.licence}

{manifest.citation}
"""


def _example(split: str, tars: list[str]) -> str:
    """Lines of Python that load the first split. tars: of the training split, if `datasets` can read them."""
    ours = f"""from shards import Loader, ShardSet  # dermscale

selection = ShardSet("folder or address").select("{split}")
loader = Loader(selection, batch_size=256, resolution=224, train={split == "train"})"""
    if not tars:
        return ours
    return f"""from datasets import load_dataset

samples = load_dataset("webdataset", data_files={{"train": {json.dumps(tars)}}}, split="train")

{ours}"""


# ------------------------------------------------------------------ Croissant


def _field(where: str, name: str, kind: str, source: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A field of a record set. source: where its values are, unless the record set holds them itself."""
    field = {"@type": "cr:Field", "@id": f"{where}/{name}", "name": name, "dataType": kind}
    return field | ({"source": source} if source else {}) | more


def _kind(column: "pa.DataType") -> str:
    """Croissant's type of a column of the index."""
    import pyarrow as pa

    if pa.types.is_boolean(column):
        return "sc:Boolean"
    if pa.types.is_integer(column):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(column) else "sc:Text"


def _listed(name: str, key: str, kind: str, fields: dict[str, str], rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    """A record set that holds its rows itself. fields: name → type."""
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "dataType": kind,
        "key": {"@id": f"{name}/{key}"},
        "field": [_field(name, one, type_) for one, type_ in fields.items()],
        "data": [{f"{name}/{one}": cell for one, cell in zip(fields, row, strict=True)} for row in rows],
    }


def _croissant(data: "ShardSet") -> dict[str, Any]:
    """The JSON-LD: files with their hashes, classes, splits, a record for each row of the index, and the images."""
    manifest = data.manifest
    classes = [
        (label, name, manifest.classes.long_names.get(name, name)) for label, name in enumerate(manifest.classes.names)
    ]
    listed = [_listed("splits", "name", "cr:Split", {"name": "sc:Text"}, [(name,) for name in manifest.counts])]
    references = {"split": "splits/name"}
    if classes:  # else the set has no labels
        fields = {"label": "sc:Integer", "name": "sc:Text", "long_name": "sc:Text"}
        listed.append(_listed("classes", "label", "sc:Enumeration", fields, classes))
        references["label"] = "classes/label"

    def column(field: "pa.Field") -> dict[str, Any]:
        source = {"fileObject": {"@id": INDEX}, "extract": {"column": field.name}}
        more = {"references": {"field": {"@id": references[field.name]}}} if field.name in references else {}
        return _field("samples", field.name, _kind(field.type), source, **more)

    files = [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "encodingFormat": form,
            "sha256": sha256,
            **more,
        }
        for name, form, sha256, more in (
            (INDEX, "application/x-parquet", manifest.index_sha256, {}),
            *(
                (one.file, "application/x-tar", one.sha256, {"contentSize": f"{one.bytes} B"})
                for one in manifest.shards
            ),
        )
    ]
    tars = [{"@id": shard.file} for shard in manifest.shards]
    sets, images = [], []
    for encoding in np.unique(data.column("encoding").astype(str)).tolist():
        suffix, form, kind = _MEMBERS[encoding]
        name = f"images-{suffix}"
        sets.append(
            {
                "@type": "cr:FileSet",
                "@id": f"{suffix}-files",
                "name": f"{suffix}-files",
                "containedIn": tars,
                "encodingFormat": form,
                "includes": f"*.{suffix}",
            }
        )
        source = {"fileSet": {"@id": f"{suffix}-files"}}
        image_id = {"extract": {"fileProperty": "filename"}, "transform": {"regex": r"^([^.]+)\."}}
        images.append(
            {
                "@type": "cr:RecordSet",
                "@id": name,
                "name": name,
                "key": {"@id": f"{name}/image_id"},
                "field": [
                    _field(name, "image_id", "sc:Text", source | image_id),
                    _field(name, "image", kind, source | {"extract": {"fileProperty": "content"}}),
                ],
            }
        )
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": _name(manifest),
        "description": f"{len(data):,} images of {len(classes)} classes in webdataset tars with an index.",
        "license": _licence(manifest.licence)[1],
        "citeAs": manifest.citation,
        "version": f"{FORMAT_VERSION}.0.0+{manifest.index_sha256[:12]}",
        "distribution": files + sets,
        "recordSet": [
            *listed,
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "key": {"@id": "samples/image_id"},
                "field": [column(field) for field in data.table.schema],
            },
            *images,
        ],
    }
