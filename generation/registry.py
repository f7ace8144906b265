"""The generators by name. A name costs nothing until it is asked for: modules are imported lazily.

A package adds its own with an entry point of the group ``flawsmith.generators``::

    [project.entry-points."flawsmith.generators"]
    scorch = "my_package.scorch:GENERATOR"
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from generation.protocol import Generator
from manifests.errors import UsageError

GROUP = "flawsmith.generators"
BUILT_IN = {
    "perlin": "generation.perlin:GENERATOR",
    "cutpaste": "generation.cutpaste:GENERATOR",
    "scar": "generation.scar:GENERATOR",
    "crack": "generation.crack:GENERATOR",
    "chip": "generation.chip:GENERATOR",
    "fibre": "generation.fibre:GENERATOR",
    "poisson": "generation.poisson:GENERATOR",
    "band": "generation.frequency.family:BAND",
    "fda": "generation.frequency.family:FDA",
    "fact": "generation.frequency.family:FACT",
    "apr": "generation.frequency.family:APR",
    "laplacian": "generation.frequency.family:LAPLACIAN",
    "wavelet": "generation.frequency.family:WAVELET",
    "notch": "generation.frequency.family:NOTCH",
    "peak": "generation.frequency.family:PEAK",
    "blur": "generation.frequency.family:BLUR",
    "sharpen": "generation.frequency.family:SHARPEN",
    "highpass": "generation.frequency.family:HIGHPASS",
    "shift": "generation.frequency.family:SHIFT",
    "feature-noise": "generation.feature.family:GAUSSIAN",
    "feature-jitter": "generation.feature.family:JITTER",
    "feature-ascent": "generation.feature.family:ASCENT",
    "feature-local": "generation.feature.family:LOCAL",
    "feature-adversarial": "generation.feature.family:ADVERSARIAL",
    "feature-flow": "generation.feature.family:FLOW",
    "feature-copy": "generation.feature.family:COPY",
    "feature-shuffle": "generation.feature.family:SHUFFLE",
    "feature-insert": "generation.feature.family:INSERT",
    "cut": "generation.cut.generator:GENERATOR",
}


def names() -> list[str]:
    """Every known generator, built in or from an installed package, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


@cache
def get(name: str) -> Generator:
    """The generator of that name, found once a process: looking through the installed packages takes
    milliseconds, and every sample asks. A built-in name cannot be taken by another package.

    Raises:
        UsageError: no such generator, or an entry point that names something else.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=GROUP, name=name):
        generator = point.load()
        if not isinstance(generator, Generator):
            raise UsageError(
                f"entry point {name!r} ({point.value}) of group {GROUP} is a {type(generator).__name__}, "
                "not a generation.protocol.Generator: correct it in the package that declares it"
            )
        return generator
    near = get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"unknown generator {name!r}: {hint}known: {', '.join(names())}")
