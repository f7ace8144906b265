"""Trained detectors on disk: ``model.safetensors`` and ``config.yaml``, nothing else, and never a pickle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from detectors.protocol import Detector, get
from manifests.errors import FlawsmithError
from manifests.plain import from_yaml
from manifests.storage import read_file

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how torch.save's and pickle's files begin
PACKAGES = ("flawsmith", "torch", "timm", "numpy")


class CheckpointError(FlawsmithError):
    """A checkpoint that is missing, damaged, unsafe or does not fit this installation."""


def save(
    folder: str | Path,
    name: str,
    detector: Detector,
    *,
    seed: int,
    licences: Sequence[str] = (),
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a trained, calibrated detector. Each file appears whole or not at all, ``config.yaml`` last.

    Args:
        folder: made if need be.
        name: of the detector in the registry.
        seed: of the training.
        licences: of the pictures it was trained on.
        notes: plain facts about the training that whoever uses the detector may need.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in detector.state_dict().items()}
    weights = save_tensors(tensors)
    config = {
        "detector": name,
        "settings": detector.settings.model_dump(mode="json"),
        "categories": list(detector.categories),
        "backbone": detector.fingerprint,
        "weights": hashlib.sha256(weights).hexdigest(),
        "calibration": dict(detector.calibration),
        "seed": seed,
        "licences": sorted(set(licences)),
        "notes": dict(notes or {}),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    _write(folder / WEIGHTS, weights)
    _write(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())


def load(folder: str | Path, device: str = "cpu") -> Detector:
    """Read a detector, ready to score.

    Args:
        folder: may be an fsspec URL.

    Raises:
        CheckpointError: a file is missing or damaged, a pickle, written for another detector or backbone.
    """
    weights, written = _inside(folder, WEIGHTS), _inside(folder, CONFIG)
    if PurePath(folder).suffix in PICKLES:
        raise CheckpointError(_refused(folder))
    config = read_config(folder)
    method = get(config["detector"])
    try:
        settings = method.settings.model_validate(config["settings"])
    except ValidationError as error:
        raise CheckpointError(
            f"{written}: settings do not fit this version of {method.name}: {error}; train again"
        ) from error
    data = read_part(folder, WEIGHTS)
    # safetensors begins with a length, whose first byte may be a pickle's, and then its header's brace
    if data.startswith((ZIP, PICKLE)) and data[8:9] != b"{":
        raise CheckpointError(_refused(weights))
    if config.get("weights") not in (None, hashlib.sha256(data).hexdigest()):
        raise CheckpointError(f"{weights} is damaged (its sha256 is not the one in {CONFIG}); train again")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is damaged ({error}); train again") from error
    detector = method.build(settings, config["categories"], device)
    if detector.fingerprint != config["backbone"]:
        raise CheckpointError(
            f"{folder}: trained on backbone {config['backbone']}, found {detector.fingerprint}; "
            "install the weights it was trained on, or train again"
        )
    try:
        detector.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{weights} does not fit its {CONFIG}: {error}; train again") from error
    detector.calibration = dict(config["calibration"])
    detector.eval()
    return detector


def read_config(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, as :func:`save` writes it.

    Raises:
        CheckpointError: it is missing or not such a file.
    """
    path = _inside(folder, CONFIG)
    try:
        config = from_yaml(read_part(folder, CONFIG))
    except ValueError as error:
        raise CheckpointError(f"{path} is not plain YAML ({error}); train again") from error
    wanted = {"detector", "settings", "categories", "backbone", "calibration"}
    if not isinstance(config, dict) or not wanted <= set(config):
        missing = sorted(wanted - set(config)) if isinstance(config, dict) else sorted(wanted)
        raise CheckpointError(f"{path} is not a detector's: it lacks {', '.join(missing)}")
    return config


def _refused(path: str | Path) -> str:
    return (
        f"{path} holds a pickle, which could run any code when it is read: refused. Give the folder of a "
        f"checkpoint that flawsmith wrote ({WEIGHTS} and {CONFIG})"
    )


def _inside(folder: str | Path, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}"


def read_part(folder: str | Path, name: str) -> bytes:
    """The bytes of a checkpoint's ``WEIGHTS`` or ``CONFIG``.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        return read_file(_inside(folder, name))
    except (FileNotFoundError, NotADirectoryError) as error:
        others = [] if "://" in str(folder) else Path(folder).glob("*")
        if pickles := sorted(str(path) for path in others if path.suffix in PICKLES):
            raise CheckpointError(_refused(pickles[0])) from error
        raise CheckpointError(
            f"{_inside(folder, name)} is missing: {folder} is no checkpoint; `flawsmith train` writes one"
        ) from error


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
