"""Column names and types of every table, and the records that pass between stages.

The names are a contract (docs/formats.md): other tools read these tables with nothing but Parquet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

Split = Literal["train", "calibration", "feedback", "test"]
GOOD = "good"  # the defect name of a normal picture, as in the MVTec AD layout

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),  # sha256 of the decoded pixels, their shape and type
        ("path", pa.string()),  # file or fsspec URL, e.g. tar://member::/shards/x.tar
        ("sha256", pa.string()),  # of the file's bytes
        ("category", pa.string()),
        ("defect", pa.string()),  # "good" or the name of the defect type
        ("mask_path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),  # L or RGB
        ("bits", pa.int8()),  # 8 or 16
        ("group", pa.string()),
        ("split", pa.string()),
        ("licence", pa.string()),
        ("mm_per_pixel", pa.float64()),
        ("roi_path", pa.string()),
        ("ignore_path", pa.string()),
        ("window_low", pa.int32()),  # 16-bit pictures: the source's one window of grey levels
        ("window_high", pa.int32()),
    ]
)

RECIPES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("round", pa.int32()),
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("generator", pa.string()),
        ("defect", pa.string()),
        ("prompt", pa.string()),
        ("detail", pa.string()),
        ("area", pa.float64()),
        ("severity", pa.float64()),
        ("count", pa.int32()),
        ("location", pa.string()),
        ("donors", pa.list_(pa.string())),
        ("params", pa.string()),
        ("seed", pa.int64()),
        ("batch", pa.int32()),
        ("shard", pa.int32()),
    ]
)

SAMPLES = pa.schema(
    [
        *(field.with_name("wanted_area") if field.name == "area" else field for field in RECIPES),
        ("area", pa.float64()),  # share of the picture that the stored mask covers
        ("status", pa.string()),  # accepted | rejected | failed
        ("reason", pa.string()),  # of the last attempt, empty if accepted
        ("leak", pa.float64()),
        ("hollow", pa.float64()),
        ("contrast", pa.float64()),
        ("measures", pa.string()),  # json: the generator's own figures of the last attempt, empty if none
        ("attempts", pa.int32()),
        ("offset", pa.int64()),  # of the sample's first tar header, in bytes; -1 if not accepted
        ("checksum", pa.string()),  # CRC-32 of the sample's members, in tar order
        ("seconds", pa.float64()),
        ("device", pa.string()),
        ("versions", pa.string()),
    ]
)

SHARDS = pa.schema(
    [
        ("round", pa.int32()),
        ("shard", pa.int32()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("samples_bytes", pa.int64()),  # of its samples table
        ("accepted", pa.int32()),
        ("rejected", pa.int32()),
        ("failed", pa.int32()),
        ("fingerprint", pa.string()),
        ("seconds", pa.float64()),
        ("host", pa.string()),
        ("lossy", pa.bool_()),
    ]
)

LEAKING = "(leaking)"  # behind the names of detectors whose figures know more than a single picture says
METRICS = pa.schema(
    [
        ("round", pa.int32()),
        ("detector", pa.string()),  # its name, in this table and the next two, and perhaps LEAKING
        ("seed", pa.int64()),
        ("category", pa.string()),  # 'mean' for the unweighted mean over categories
        ("defect", pa.string()),  # 'all' for every type together; MVTec LOCO also 'mean' over the types
        ("size", pa.string()),  # 'all', or tiny | small | large by component area
        ("split", pa.string()),  # feedback | test | heldout_synthetic
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),  # of the 95 % interval; null where it is undefined
        ("high", pa.float64()),
    ]
)

SCORES = pa.schema(
    [
        ("round", pa.int32()),
        ("detector", pa.string()),
        ("seed", pa.int64()),
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("split", pa.string()),
        ("label", pa.int8()),  # 1 = anomalous
        ("score", pa.float64()),
    ]
)

STRESS = pa.schema(
    [
        ("round", pa.int32()),
        ("detector", pa.string()),
        ("seed", pa.int64()),
        ("kind", pa.string()),  # viewpoint | light | blur
        ("level", pa.int8()),  # 0 = undisturbed
        ("strength", pa.float64()),  # in the unit of the kind, see training/stress.py
        ("category", pa.string()),  # 'mean' for the unweighted mean over categories
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)

TRIALS = pa.schema(
    [
        ("round", pa.int32()),
        ("trial", pa.int32()),
        ("origin", pa.string()),  # current | rule | move | combined | sampler
        ("fold", pa.int8()),  # whose pictures it was chosen by; -1: none
        ("shards", pa.int32()),  # of the probe
        ("params", pa.string()),  # json: path -> value, where it differs from the present settings
        ("pixel_ap", pa.list_(pa.float64())),  # on the pictures of either fold
        ("aupro", pa.list_(pa.float64())),
        ("false_positives", pa.list_(pa.float64())),
        ("cost", pa.float64()),  # seconds a sample, by what the generators say of themselves
        ("seconds", pa.float64()),  # that the trial took
    ]
)

# How much a sample counts in the training of its round's detector; the mean over those weighed is 1.
WEIGHTS = pa.schema(
    [
        ("round", pa.int32()),
        ("sample_id", pa.string()),
        ("weight", pa.float64()),
    ]
)

DECISIONS = pa.schema(
    [
        ("round", pa.int32()),  # the round whose figures led to the decision
        ("setting", pa.string()),
        ("before", pa.string()),
        ("after", pa.string()),
        ("reason", pa.string()),
    ]
)

# The settings and the aggregate metrics of every round, one row a fact.
HISTORY = pa.schema(
    [
        ("round", pa.int32()),
        ("kind", pa.string()),  # setting | metric | yield | weight | gain | stop | seconds.STAGE
        ("name", pa.string()),
        ("value", pa.string()),
    ]
)


# By the name of the file, or of the folder that holds its parts.
TABLES = {
    "images": IMAGES,
    "textures": IMAGES,
    "recipes": RECIPES,
    "samples": SAMPLES,
    "shards": SHARDS,
    "metrics": METRICS,
    "scores": SCORES,
    "stress": STRESS,
    "trials": TRIALS,
    "weights": WEIGHTS,
    "decisions": DECISIONS,
    "history": HISTORY,
    "review": pa.schema([("sample_id", pa.string())]),
}


@dataclass(frozen=True, slots=True)
class Image:
    """One picture that was read and accepted: a row of ``images.parquet``."""

    image_id: str
    path: str
    sha256: str
    category: str
    defect: str
    mask_path: str | None
    width: int
    height: int
    mode: str
    bits: int
    group: str
    split: str
    licence: str | None = None
    mm_per_pixel: float | None = None
    roi_path: str | None = None
    ignore_path: str | None = None
    window_low: int | None = None
    window_high: int | None = None

    @property
    def window(self) -> tuple[int, int] | None:
        """Grey levels mapped to 0 and 1 (16-bit pictures only)."""
        if self.window_low is None or self.window_high is None:
            return None
        return self.window_low, self.window_high


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides one sample, written before the sample is made.

    ``area`` is the wanted share of the picture in (0, 1]; ``severity`` is in [0, 1]; ``location`` is
    ``anywhere``, ``foreground`` or ``roi``; ``donors`` are ``image_id``s of other pictures or textures;
    ``params`` is the generator's own settings as canonical JSON.
    """

    sample_id: str
    round: int
    image_id: str
    category: str
    generator: str
    defect: str
    prompt: str
    detail: str
    area: float
    severity: float
    count: int
    location: str
    donors: tuple[str, ...]
    params: str
    seed: int
    batch: int
    shard: int

    def rng(self, attempt: int) -> np.random.Generator:
        """The random stream of one attempt at this sample; attempts never overlap (spawn keys)."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(attempt,)))

    def settings(self) -> dict[str, Any]:
        return json.loads(self.params)


def canonical_json(value: Any) -> str:
    """JSON with one spelling for one value, so that equal records have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def to_table(records: list[Any], schema: pa.Schema) -> pa.Table:
    """Dataclass records or dicts to a table of exactly ``schema``.

    Raises:
        pyarrow.ArrowInvalid: a value does not fit its column.
        KeyError: a record lacks a column.
    """
    rows = [record if isinstance(record, dict) else as_row(record) for record in records]
    return pa.table({name: [row[name] for row in rows] for name in schema.names}, schema=schema)


def declared(name: str) -> pa.Schema | None:
    """The schema of a table by its name in a workspace; None of a table that no other tool relies on.

    >>> declared("rounds/000/samples/part-00000.parquet") is SAMPLES
    True
    """
    *folders, file = name.removesuffix(".parquet").split("/")
    return TABLES.get(folders[-1] if folders and file.startswith("part-") else file)


def as_declared(table: pa.Table, schema: pa.Schema | None) -> pa.Table:
    """The table with every column of the schema in its type; columns beyond those are left as they are.

    Raises:
        ValueError: a column is missing or there twice.
        pyarrow.ArrowException: a column is of another type.
    """
    for field in schema or ():
        at = table.schema.get_all_field_indices(field.name)
        if len(at) != 1:
            raise ValueError(f"it has {len(at)} columns {field.name}, expected one")
        if table.schema.field(at[0]).type != field.type:
            table = table.set_column(at[0], field, table.column(at[0]).cast(field.type))
    return table


def as_row(record: Any) -> dict[str, Any]:
    """The fields of a flat dataclass, without the deep copies of ``asdict``: plans have millions of rows."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def images_from(table: pa.Table) -> list[Image]:
    names = set(Image.__dataclass_fields__)
    return [Image(**{k: v for k, v in row.items() if k in names}) for row in table.to_pylist()]


def recipes_from(table: pa.Table) -> list[Recipe]:
    """Recipes of a ``recipes`` or a ``samples`` table (there the wanted area is ``wanted_area``)."""
    if "wanted_area" in table.column_names:
        table = table.drop_columns(["area"]).rename_columns({"wanted_area": "area"})
    rows: list[dict[str, Any]] = table.select(RECIPES.names).to_pylist()
    return [Recipe(**{**row, "donors": tuple(row["donors"] or ())}) for row in rows]
