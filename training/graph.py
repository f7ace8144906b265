"""A trained detector as one graph for other runtimes: decoded pictures in; score, map and decision out.

The graph holds everything from the resize of the pictures to the alarm threshold, and is traced from the very
functions that training and prediction call, so nothing is written a second time. What a user needs beside it
(categories, thresholds, form of the input, fingerprint, licences, versions) is stored in the same file.

Two formats. ``onnx``: for ONNX Runtime and whatever else reads ONNX; the facts are in ``metadata_props``,
each a JSON text under ``flawsmith.NAME``. ``torch-export``: a ``.pt2`` for ``torch.export.load``; the facts
are its extra file ``flawsmith.json``.

Reading an ONNX file runs no code of the file. Loading a ``.pt2`` may: weights and graph are raw bytes and
JSON as written here, but the example input is a pickle, and ``torch.export.load`` (2.14) unpickles whatever
the file says is one, falling back to unsafe reading. So load only files you trust; this package loads none.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detectors.protocol import Detector, get, refuse_leak
from generation.backbones import resize
from manifests.errors import FlawsmithError, UsageError
from training import checkpoints

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
PREFIX, EXTRA_FILE = "flawsmith.", "flawsmith.json"
OUTPUTS = ("score", "map", "anomalous")
PACKAGES = ("flawsmith", "torch", "onnx", "onnxscript")
MAX_ONNX_BYTES = 2**31 - 2**24  # one protobuf message has less than 2 GiB, the graph's nodes included
EXAMPLE = (3, 44, 52, 3)  # no two axes alike, and none of them 1: an export would take these for constants


class GraphError(FlawsmithError):
    """A detector that cannot become a graph."""


class Graph(nn.Module):
    """A detector with what surrounds it in ``training.evaluation.predict`` and the decision after it.

    Args:
        detector: trained, in eval mode, on the CPU.
        threshold: scores above it are anomalous.
        category: goes to the detector with every picture; None for one that needs none.
    """

    def __init__(self, detector: Detector, threshold: float, category: str | None = None):
        super().__init__()
        self.detector, self.threshold, self.category = detector, threshold, category

    def forward(self, pictures: Tensor, ignore: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 N×H×W×3 to score (float32, N), map (float32, N×size×size) and decision (bool, N). ``ignore``:
        bool size×size, places that may raise no picture's score."""
        features = self.detector.extract(resize(pictures, self.detector.settings.size))
        batch: dict[str, Any] = {"features": features.half()}  # as they are cached
        if self.category is not None:
            batch["category"] = [self.category] * len(pictures)
        if ignore is not None:
            batch["ignore"] = ignore.expand(pictures.shape[0], *ignore.shape)
        score, maps = self.detector.score(batch)
        return score, maps.float(), score > self.threshold


def export(
    checkpoint: str | Path, out: str | Path, format: str, threshold: float, category: str | None = None
) -> dict[str, Any]:
    """Write a checkpoint as one file, which appears whole or not at all.

    Args:
        checkpoint: folder of a trained detector.
        out: file to write; replaced if it is there.
        format: a key of ``FORMATS``.
        threshold: scores above it are anomalous.
        category: of the pictures; needed where the detector asks for it. Where its scores depend on it, the
            graph is for that one then.

    Returns:
        The facts stored in the file: those of the checkpoint's ``config.yaml``, and ``open_categories``,
        ``category``, ``threshold``, ``input``, ``outputs`` and ``exported_with``.

    Raises:
        UsageError: unknown format, a category is needed, a package is missing, or scores depend on what else
            is scored (``Settings.leak``).
        GraphError: the detector cannot be traced, or is too large.
        CheckpointError: the checkpoint cannot be used.
    """
    out = Path(out)
    if format not in FORMATS:
        raise UsageError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    if out.suffix != FORMATS[format]:
        raise UsageError(f"--out {out}: {format} is kept in a file *{FORMATS[format]}")
    if format == "onnx":
        _require("onnx", "onnxscript")
    detector, config = checkpoints.load(checkpoint), checkpoints.read_config(checkpoint)
    refuse_leak(str(checkpoint), detector.settings)
    graph = Graph(detector, threshold, category if _reads_category(detector, category) else None).eval()
    program, batch, places = _trace(graph, format == "onnx")
    facts = {
        **config,
        "open_categories": get(config["detector"]).open_categories,
        "category": category,
        "threshold": threshold,
        "input": {
            "name": "pictures",
            "dtype": "uint8",
            "shape": [batch, "height", "width", 3],
            "means": "RGB, upright; grey has three equal channels; any size. As in training, first shrink "
            "to the longest side notes.max_side by area averaging, and map 16 bits so that notes.window "
            "becomes 0..255",
            "category": graph.category,
            "ignore": "bool, size×size, may be left out; true where no picture's score may come from, as "
            "outside a region of interest"
            if places
            else None,
        },
        "outputs": {
            "score": "float32, one a picture; higher = more anomalous",
            "map": f"float32, size×size with size = {detector.settings.size}; higher = more anomalous",
            "anomalous": "bool, one a picture: score > threshold",
        },
        "exported_with": {name: _version(name) for name in PACKAGES},
    }
    write = {"onnx": partial(_to_onnx, facts), "torch-export": partial(_to_pt2, facts)}[format]
    _write(out, partial(write, program))
    return facts


def _trace(graph: Graph, ignoring: bool) -> tuple[torch.export.ExportedProgram, Any, bool]:
    """The traced graph; its batch size: a name where any will do, 1 where the detector fixes it; whether it
    has the input ``ignore``, if that is wished for.

    A detector may have steps that stand in the way of either, such as a list with an item a picture or a
    branch on what is ignored; torch has no single error for those, so the best that can be traced is taken.
    """
    height, width = (torch.export.Dim(name, min=1, max=2**16) for name in ("height", "width"))
    batch = torch.export.Dim("batch", min=1, max=2**16)
    pictures = torch.zeros(EXAMPLE, dtype=torch.uint8)
    nothing = torch.zeros((graph.detector.settings.size,) * 2, dtype=torch.bool)
    failure: Exception | None = None
    with _traceable():
        for places in (True, False) if ignoring else (False,):
            for count, axes in (("batch", {0: batch, 1: height, 2: width}), (1, {1: height, 2: width})):
                given = (pictures if count == "batch" else pictures[:1], *((nothing,) if places else ()))
                shapes = {"pictures": axes, "ignore": {}} if places else {"pictures": axes}
                try:
                    program = torch.export.export(graph, given, dynamic_shapes=shapes, strict=False)
                except Exception as error:
                    failure = error
                else:
                    return program, count, places
    first = str(failure).strip().partition("\n")[0]
    raise GraphError(
        f"this detector cannot be traced ({type(failure).__name__}: {first}): its extract and score must be "
        "tensor code without branches on values"
    ) from failure


@contextmanager
def _traceable() -> Iterator[None]:
    """The fused attention of eval mode is one operator that no other runtime has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _reads_category(detector: Detector, category: str | None) -> bool:
    """Whether ``score`` refuses pictures without one, or scores them otherwise. Where neither is so, a graph
    without it may take any batch."""
    size = detector.settings.size
    noise = torch.randint(
        256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    features = detector.extract(noise).half()
    try:
        unnamed = detector.score({"features": features})[0]
    except UsageError as error:
        if category is None:
            raise UsageError(f"{error}; or export for one category: --category NAME") from error
        return True
    if category is None:
        return False
    names = {*detector.categories, category}  # it may be one that was not trained on
    named = (detector.score({"features": features, "category": [name]})[0] for name in names)
    return len({score.item() for score in (unnamed, *named)}) > 1


def _to_onnx(facts: Mapping[str, Any], program: torch.export.ExportedProgram, path: Path) -> None:
    import onnx_ir  # of the optional packages, as the exporter's own model

    held = [*program.state_dict.values(), *(c for c in program.constants.values() if isinstance(c, Tensor))]
    if sum(tensor.nbytes for tensor in held) > MAX_ONNX_BYTES:
        raise GraphError("more than 2 GiB, which one ONNX file cannot hold; use --format torch-export")
    with warnings.catch_warnings(), _quiet("onnxscript", "onnx_ir", "torch.onnx"):
        warnings.simplefilter("ignore")
        names = ["pictures", *(["ignore"] if facts["input"]["ignore"] else [])]
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=list(OUTPUTS), verbose=False
        )
    assert onnx is not None
    for value in onnx.model.graph.inputs[1:]:  # an input that is an initialiser too may be left out
        assert value.shape is not None
        value.const_value = onnx_ir.tensor(torch.zeros(value.shape.numpy(), dtype=torch.bool).numpy())
        onnx.model.graph.register_initializer(value)
    onnx.model.metadata_props.update(
        {PREFIX + name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
    )
    onnx.save(str(path), external_data=False)


def _to_pt2(facts: Mapping[str, Any], program: torch.export.ExportedProgram, path: Path) -> None:
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={EXTRA_FILE: text})


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers that speak of each folded constant."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _write(out: Path, save: Callable[[Path], None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{uuid.uuid4().hex}{out.suffix}")
    try:
        save(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def _require(*packages: str) -> None:
    missing = [name for name in packages if _version(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx needs the packages {', '.join(missing)}: pip install 'flawsmith[export]'"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
