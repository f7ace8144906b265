"""A file of figures that a benchmark goes on from where it was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from manifests.errors import UsageError

ROOT = Path(__file__).parents[2]
PACKAGES = ("manifests", "generation", "detectors", "training", "workflows")


def product_code(*more: ModuleType) -> str:
    """The first digits of the sha256 of the product, with its data but without the report, and of ``more``:
    which code figures are of."""
    files = [
        file
        for name in PACKAGES
        for file in (ROOT / name).rglob("*")
        if file.is_file() and not {"__pycache__", "report"} & set(file.relative_to(ROOT).parts)
    ]
    files += [Path(module.__file__ or "") for module in more]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def open_file(path: Path, of: dict[str, Any], **empty: Any) -> dict[str, Any]:
    """What was measured before: ``case`` is ``of``, beside it the figures, at first those of ``empty``.

    Raises:
        UsageError: the file holds figures of another case.
    """
    if not path.exists():
        return {"case": of, **empty}
    stored = json.loads(path.read_text(encoding="utf-8"))
    if wrong := [key for key, value in of.items() if stored["case"].get(key) != value]:
        raise UsageError(
            f"{path} holds figures of another {', '.join(wrong)} (there {stored['case']}, now {of}): name "
            "another file"
        )
    return stored


def write_file(path: Path, result: Any) -> None:
    """As JSON, whole or not at all. Numbers that are not finite become null."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
