"""What 10^6, 10^8 and 10^9 samples would take: arithmetic on figures measured, counted or published.

    python -m tests.benchmarks.scale_model [--into docs/scale.md]

Nothing is run. Every input is in :data:`INPUTS` with its kind and its source, or in :data:`GENERATORS`, which
is the README's table. The tables that it prints are those of ``docs/scale.md``, and ``--into`` writes them
there, between their marks.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["measured", "counted", "published", "assumed"]
Rows = list[list[str]]
SAMPLES = (10**6, 10**8, 10**9)
SHARD_SIZES = (128, 1_000, 10_000)
WEEK = 7 * 24 * 3600.0
# ms a sample at 256 and 1024 px, gates and redraws included; README: one thread, other jobs beside it.
GENERATORS = {
    "chip": (2.3, 25.5),  # of another day and machine
    "crack": (1.6, 7.5),  # of a machine half as fast
    "cutpaste": (1.3, 14.1),
    "fibre": (2.5, 12.3),  # processor time, of another day and machine
    "perlin": (1.8, 18.8),
    "poisson": (1.3, 13.3),
    "scar": (2.0, 26.8),
    "apr": (4.8, 72.0),
    "band": (3.9, 52.7),
    "blur": (39.5, 585.2),
    "fact": (3.6, 34.4),
    "fda": (3.6, 39.7),
    "highpass": (10.1, 63.2),  # processor time, of another day and machine
    "laplacian": (2.6, 28.2),
    "notch": (20.5, 146.7),
    "peak": (2.2, 18.3),
    "sharpen": (2.5, 22.1),
    "shift": (7.4, 64.4),
    "wavelet": (3.3, 34.0),
}
# generation.generators by default, equal shares
MIX = {"perlin": 1.0, "cutpaste": 1.0, "scar": 1.0, "poisson": 1.0, "chip": 3.0, "band": 1.0}  # shares


@dataclass(frozen=True)
class Figure:
    """An input: its value in the unit named, how it is known, and by what."""

    value: float
    unit: str
    kind: Kind
    source: str


_ENCODE = "median processor time of `pictures.encode` and `encode_mask`, drawn demonstration pictures"
_BYTES = "shards of 64 to 256 samples, default mix, drawn demonstration pictures, lossless WebP"
_SCALE = "`tests.benchmarks.scale`, a million recipes, two cores, load 12–15"
_DIFFUSERS = "diffusers 0.17 documentation, torch 2.0 benchmark, SD 1.5 in float16, not compiled, batch of 4"
_SHEET = "maker's data sheet, dense half precision"
_S3 = "Amazon S3 user guide"
INPUTS: dict[str, Figure] = {
    # seconds
    "run 256": Figure(
        265, "samples/s a core", "measured", "README, run of 5,000 samples: 250–280, without `chip`"
    ),
    "overhead 256": Figure(0.15, "of it beside drawing and encoding", "measured", "README, the same run"),
    "encode 256": Figure(1.9, "ms a sample", "measured", _ENCODE),
    "encode 512": Figure(5.9, "ms a sample", "measured", _ENCODE),
    "encode 1024": Figure(25.3, "ms a sample", "measured", _ENCODE),
    "cut, shipped models": Figure(2.2, "s a spot, one CPU thread", "measured", "docs/measured.md, `cut`"),
    "cut, SD 1.5": Figure(
        95.04, "TFLOP a spot", "counted", "`tests.benchmarks.cut --flops`, 512 px, default"
    ),
    "UNet": Figure(0.8033, "TFLOP a forward pass", "counted", "`tests.benchmarks.flops`, SD 1.5, 512 px"),
    "spots": Figure(2, "a sample", "counted", "`generation.count` 1–3, the default"),
    "first draws": Figure(0.81, "accepted", "measured", "docs/measured.md, `cut`, shipped models"),
    # GPUs
    "H100 peak": Figure(989, "TFLOP/s", "published", f"{_SHEET} (SXM)"),
    "A100 peak": Figure(312, "TFLOP/s", "published", _SHEET),
    "V100 peak": Figure(125, "TFLOP/s", "published", _SHEET),
    "L4 peak": Figure(121, "TFLOP/s", "published", f"{_SHEET} (242 with sparsity)"),
    "T4 peak": Figure(65, "TFLOP/s", "published", _SHEET),
    "A100 steps": Figure(11.6, "steps/s", "published", _DIFFUSERS),
    "V100 steps": Figure(5.96, "steps/s", "published", _DIFFUSERS),
    "T4 steps": Figure(1.79, "steps/s", "published", _DIFFUSERS),
    "H100 utilisation": Figure(
        0.20, "of the peak", "assumed", "a little below the A100's, for want of a figure"
    ),
    "L4 utilisation": Figure(0.20, "of the peak", "assumed", "between the A100's and the T4's"),
    # bytes
    "tar 256": Figure(215_654, "bytes an accepted sample", "measured", _BYTES),
    "tar 512": Figure(841_680, "bytes an accepted sample", "measured", _BYTES),
    "tar 1024": Figure(3_284_439, "bytes an accepted sample", "measured", _BYTES),
    "bare 256": Figure(109_281, "bytes without normals", "measured", _BYTES),
    "bare 512": Figure(422_800, "bytes without normals", "measured", _BYTES),
    "bare 1024": Figure(1_646_202, "bytes without normals", "measured", _BYTES),
    "tables": Figure(330, "bytes a recipe", "measured", "samples and recipes of a shard of 128, zstd"),
    "record": Figure(58, "bytes a shard", "measured", "`shards.parquet`, 50,000 rows of random figures"),
    "features": Figure(75_264, "bytes a sample", "measured", "OneNIP's default, float16 192×14×14"),
    "training mask": Figure(50_176, "bytes a sample", "counted", "bool 224×224, `training.examples`"),
    # client, scheduler, store
    "task": Figure(
        4.2, "ms of processor time a shard", "measured", f"{_SCALE}: 4.0–4.4, client and scheduler"
    ),
    "client": Figure(4_000, "bytes a shard", "measured", f"{_SCALE}: growth of client and scheduler"),
    "restart": Figure(
        154, "µs a shard", "measured", "`unfinished` and `extra_files`, 200,000 made-up shards"
    ),
    "keys": Figure(1_000, "keys a listing's request", "published", _S3),
    "listing": Figure(0.1, "s a listing's request", "assumed", "one after the other"),
    "listings": Figure(5, "at a start", "counted", "`unfinished` two, `extra_files` three"),
    "objects": Figure(3, "put a shard", "counted", "`make_shard`: recipes, tar, samples"),
    "puts": Figure(3_500, "requests/s a partitioned prefix", "published", f"{_S3}; at least"),
    "network": Figure(1.25, "GB/s a machine", "assumed", "10 Gbit/s"),
    # what a run is held against
    "client's machine": Figure(16, "GB", "assumed", "memory that client and scheduler may take"),
    "scratch disk": Figure(4, "TB", "assumed", "of a training machine, for features"),
}


def of(name: str) -> float:
    return INPUTS[name].value


# -- seconds a sample -----------------------------------------------------------------------------------


def rest(side: int) -> float:
    """Seconds a sample of a run on CPUs beside drawing and encoding: measured at 256 px, and in proportion to
    the bytes, which is more than it can be, at other sizes."""
    return of("overhead 256") / of("run 256") * of(f"tar {side}") / of("tar 256")


def with_encoding(drawing: float, side: int) -> float:
    """Seconds a sample on one core, of ``drawing`` ms."""
    return (drawing + of(f"encode {side}")) / 1e3 + rest(side)


def default_mix(side: int) -> float:
    """Seconds a sample of the default mix on one core; at 256 px a run's own rate."""
    if side == 256:
        return 1 / of("run 256")
    drawing = sum(share * GENERATORS[name][1] for name, share in MIX.items()) / sum(MIX.values())
    return with_encoding(drawing, side)


def operations() -> float:
    """TFLOP a sample of ``cut`` on SD 1.5: all spots of all draws."""
    return of("cut, SD 1.5") * of("spots") / of("first draws")


def utilisation(card: str) -> float:
    """Of the peak. Where steps/s are published: two UNet passes (guidance) for each of four pictures."""
    if f"{card} utilisation" in INPUTS:
        return of(f"{card} utilisation")
    return 2 * 4 * of("UNet") * of(f"{card} steps") / of(f"{card} peak")


def on_gpu(card: str) -> float:
    """Seconds a sample of ``cut`` on SD 1.5: an estimate, nothing was run."""
    return operations() / (of(f"{card} peak") * utilisation(card))


@dataclass(frozen=True)
class Case:
    """What is made: seconds a sample on one device, bytes a sample."""

    name: str
    device: str
    seconds: float
    bytes: float


CARDS = ("H100", "A100", "V100", "L4", "T4")
CASES = (
    Case("default mix, 256 px", "CPU core", default_mix(256), of("tar 256")),
    Case("default mix, 1024 px", "CPU core", default_mix(1024), of("tar 1024")),
    Case(
        "`cut`, shipped models, 256 px",
        "CPU core",
        of("cut, shipped models") * of("spots") / of("first draws"),
        of("tar 256"),
    ),
    *(Case("`cut`, SD 1.5, 512 px", card, on_gpu(card), of("tar 512")) for card in ("H100", "A100", "T4")),
)


# -- limits ---------------------------------------------------------------------------------------------


def shards(samples: int, size: int) -> int:
    return -(-samples // size)


def most_workers(case: Case, size: int) -> float:
    """With more of them, client and scheduler (one thread) are what a run waits for."""
    return size * case.seconds / (of("task") / 1e3)


def restart_seconds(count: int) -> float:
    """Of the client, at the start of a round of ``count`` shards on an object store."""
    return of("listings") * count / of("keys") * of("listing") + count * of("restart") / 1e6


def loads(samples: int, size: int, seconds: float) -> dict[str, float]:
    """What a round that takes ``seconds`` uses of each limit, 1 = all of it. That of the devices is not
    among them: they are what is bought."""
    count = shards(samples, size)
    return {
        "client and scheduler, time": count * of("task") / 1e3 / seconds,
        "client, memory": count * of("client") / (of("client's machine") * 1e9),
        "PUTs of a prefix": count * of("objects") / seconds / of("puts"),
        "training, reading 256 px": samples * of("tar 256") / (of("network") * 1e9) / seconds,
        "training, features on disk": samples * training_bytes() / (of("scratch disk") * 1e12),
    }


def training_bytes() -> float:
    """A sample, for every process of a training: each has all rows."""
    return of("features") + of("training mask")


# -- tables ---------------------------------------------------------------------------------------------


def inputs() -> Rows:
    rows = [["input", "value", "how known", "by what"]]
    return rows + [[name, f"{f.value:,} {f.unit}", f.kind, f.source] for name, f in INPUTS.items()]


def generators() -> Rows:
    rows = [
        ["generator", "ms a sample, 256 px", "1024 px", "samples/s a core, all in all, 256 px", "1024 px"]
    ]
    for name, pair in GENERATORS.items():
        rates = [1 / with_encoding(ms, side) for ms, side in zip(pair, (256, 1024), strict=True)]
        rows.append([f"`{name}`", *(f"{ms:g}" for ms in pair), *map(_short, rates)])
    rates = [1 / default_mix(side) for side in (256, 1024)]
    return [*rows, ["default mix", "", "", *map(_short, rates)]]


def gpus() -> Rows:
    rows = [
        ["GPU", "utilisation", "s a spot", "s a sample", "samples a day", "at 40 % of the peak: s a sample"]
    ]
    for card in CARDS:
        share, each = utilisation(card), on_gpu(card)
        known = INPUTS.get(f"{card} utilisation")
        spot = of("cut, SD 1.5") / (of(f"{card} peak") * share)
        how = f"{100 * share:.0f} % {'assumed' if known else 'published'}"
        hopeful = operations() / (of(f"{card} peak") * 0.4)
        rows.append([card, how, *map(_short, (spot, each, 86_400 / each, hopeful))])
    return rows


def devices() -> Rows:
    rows = [
        ["case", "device", "s a sample", *(f"{_power(n)}: device hours; devices for a week" for n in SAMPLES)]
    ]
    for case in CASES:
        whole = [n * case.seconds for n in SAMPLES]
        cells = [f"{_short(s / 3600)}; {_short(max(1, s / WEEK))}" for s in whole]
        rows.append([case.name, case.device, _short(case.seconds), *cells])
    return rows


def storage() -> Rows:
    rows = [["", *(_power(n) for n in SAMPLES)]]
    for side in (256, 512, 1024):
        for name, kind in (("tar", ""), ("bare", ", `normals: false`")):
            rows.append([f"shards, {side} px{kind}", *(_size(n * of(f"{name} {side}")) for n in SAMPLES)])
    rows.append(["recipes and samples tables", *(_size(n * of("tables")) for n in SAMPLES)])
    rows.append(["`shards.parquet`, 128 a shard", *(_size(shards(n, 128) * of("record")) for n in SAMPLES)])
    rows.append(
        ["training: features, masks of each process", *(_size(n * training_bytes()) for n in SAMPLES)]
    )
    return rows


def scheduler() -> Rows:
    rows = [["samples", "a shard", "shards", "objects", "processor time", "memory", "starting again"]]
    for samples in SAMPLES:
        for size in SHARD_SIZES:
            count = shards(samples, size)
            times = [_duration(count * of("task") / 1e3), _duration(restart_seconds(count))]
            cells = [
                f"{count:,}",
                _short(count * of("objects")),
                times[0],
                _size(count * of("client")),
                times[1],
            ]
            rows.append([_power(samples), f"{size:,}", *cells])
    return rows


def memory() -> Rows:
    rows = [["bytes a shard; memory of its worker, twice as much", *(f"{size:,}" for size in SHARD_SIZES)]]
    for side in (256, 512, 1024):
        sizes = [size * of(f"tar {side}") for size in SHARD_SIZES]
        rows.append([f"{side} px", *(f"{_size(each)}; {_size(2 * each)}" for each in sizes)])
    return rows


def workers() -> Rows:
    rows = [
        ["case", "device", *(f"{size:,} a shard" for size in SHARD_SIZES), "MB/s of one", "fill 10 Gbit/s"]
    ]
    for case in CASES:
        rate = case.bytes / case.seconds
        most = [_short(most_workers(case, size)) for size in SHARD_SIZES]
        rows.append([case.name, case.device, *most, _short(rate / 1e6), _short(of("network") * 1e9 / rate)])
    return rows


def bottlenecks() -> Rows:
    names = list(loads(1, 1, 1))
    rows = [["samples in a week", "a shard", *names]]
    for samples in SAMPLES:
        for size in SHARD_SIZES:
            shares = loads(samples, size, WEEK).values()
            rows.append([_power(samples), f"{size:,}", *map(_share, shares)])
    return rows


TABLES = {
    "inputs": inputs,
    "generators": generators,
    "gpus": gpus,
    "devices": devices,
    "storage": storage,
    "scheduler": scheduler,
    "memory": memory,
    "workers": workers,
    "bottlenecks": bottlenecks,
}


def _short(value: float) -> str:
    """Two or three significant digits: more would be more than is known."""
    if value >= 1000:
        digits = 10 ** (len(str(int(value))) - 3)
        return f"{round(value / digits) * digits:,}"
    return f"{value:.3g}" if value >= 100 else f"{value:.2g}"


def _scaled(value: float, units: Iterable[tuple[float, str]]) -> str:
    number, unit = next(((n, u) for n, u in units if value >= n), (1.0, ""))
    return f"{_short(value / number)} {unit}".rstrip()


def _size(value: float) -> str:
    return _scaled(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def _duration(seconds: float) -> str:
    units = ((86_400.0, "days"), (3600.0, "h"), (60.0, "min"))
    return _scaled(seconds, units) if seconds >= 60 else f"{_short(seconds)} s"


def _share(value: float) -> str:
    text = f"{_short(100 * value)} %" if value >= 0.001 else "< 0.1 %"
    return f"**{text}**" if value > 1 else text


def _power(samples: int) -> str:
    return f"10^{len(str(samples)) - 1}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def printed() -> Mapping[str, str]:
    """Every table as Markdown, by its name."""
    return {name: markdown(table()) for name, table in TABLES.items()}


def filled(text: str) -> str:
    """A document with its tables, each between ``<!-- NAME -->`` and ``<!-- end of NAME -->``, written anew.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, table in printed().items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        new = f"{start}{table}\n{end}".replace("\\", r"\\")
        text, places = pattern.subn(new, text)
        if places != 1:
            raise ValueError(
                f"{places} places for the table {name}, expected 1: {start.strip()} … {end.strip()}"
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale_model", description=__doc__)
    parser.add_argument("--into", type=Path, metavar="FILE", help="write the tables into this document")
    arguments = parser.parse_args()
    for name, table in printed().items():
        print(f"{name}\n\n{table}\n")
    if arguments.into:
        arguments.into.write_text(filled(arguments.into.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
