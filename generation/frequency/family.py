"""The generators of the frequency family: an operator each, within a mask, as strong as the severity asks.

The transform sees the box of the mask with some context, not the picture: faults are local, small transforms
fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import pywt
from pydantic import AfterValidator, Field, model_validator
from scipy.fft import next_fast_len

from generation.frequency import operators
from generation.frequency.operators import Render
from generation.masks import Shape, feather, shaped
from generation.protocol import (
    Box,
    Donors,
    Edit,
    Generator,
    Params,
    Source,
    Undrawable,
    places_of,
    stored,
)
from generation.severity import solved
from generation.textures import augment, cut
from manifests.errors import PictureError, UsageError
from manifests.schema import Recipe
from manifests.searching import Search

CONTEXT = 16  # pixels around the mask that the transform sees, if the operator reaches no further
SMALLEST = 4  # pixels of a picture's side; below it there are no frequencies to speak of
EDGE = 3  # pixels of the mask's soft edge; less in small masks
RINGS = ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0))  # radius over Nyquist [inferred]
SHAPES = Search(choices=("blob", "stroke", "ellipse", "rectangle"))


def _rings(rings: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if bad := [ring for ring in rings if not 0 <= ring[0] < ring[1]]:
        raise ValueError(f"a ring is (low, high) with 0 <= low < high, found {bad[0]}")
    return rings


def _wavelet_name(name: str) -> str:
    if name not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"{name!r} is no discrete wavelet; PyWavelets has {', '.join(pywt.families())} …")
    return name


class FrequencyParams(Params):
    """Settings of every frequency generator.

    Attributes:
        shape: of the mask: ``blob``, ``stroke``, ``ellipse``, ``rectangle`` or ``whole`` (all that the
            location allows).
        strength: of the operator, the same for all samples; null: solved for each, so that the change is what
            the severity asks for.
    """

    shape: Annotated[Shape, SHAPES] = "blob"
    strength: Annotated[float | None, Search(0.1, 4, log=True)] = Field(None, gt=0)


class BandParams(FrequencyParams):
    """Settings of ``band``.

    Attributes:
        amplitude: deviation σ_a of the logarithm of the amplitudes at strength 1.
        phase: deviation σ_p of the phases at strength 1, in radians.
        rings: bands to choose from, as (low, high) radii over Nyquist.
        sector: width in degrees of the directions that are perturbed, around a random one; 180 takes all.
    """

    amplitude: Annotated[float, Search(0.1, 2, log=True)] = Field(0.5, ge=0)
    phase: Annotated[float, Search(0, 1.5)] = Field(0.3, ge=0)
    rings: Annotated[
        tuple[tuple[float, float], ...],
        Field(min_length=1),
        AfterValidator(_rings),
        Search(choices=(RINGS, RINGS[:1], RINGS[1:2], RINGS[2:], RINGS[:2], RINGS[1:])),
    ] = RINGS
    sector: Annotated[float, Search(20, 180)] = Field(180.0, gt=0, le=180)


class OtherParams(FrequencyParams):
    """Settings of ``apr``, and the first of ``fact`` and ``fda``.

    Attributes:
        other: where the second picture comes from: ``normals`` (another good picture), ``folder`` (a texture
            of the texture folder) or ``itself`` (the picture, flipped and with other levels at random: APR's
            single variant recombines two changes of one picture).
    """

    other: Literal["normals", "folder", "itself"] = "normals"


class MixParams(OtherParams):
    """Settings of ``fact``.

    Attributes:
        ratio: of the spectrum whose amplitudes are mixed, the low frequencies first; 1 as released.
    """

    ratio: Annotated[float, Search(0.02, 1, log=True)] = Field(1.0, gt=0, le=1)


class SwapParams(OtherParams):
    """Settings of ``fda``.

    Attributes:
        reach: L, half the side of the swapped square over the shorter side (0.1 as released).
    """

    reach: Annotated[float, Search(0.02, 0.3, log=True)] = Field(0.1, gt=0, le=0.5)


class LaplacianParams(FrequencyParams):
    """Settings of ``laplacian``.

    Attributes:
        levels: of the pyramid to choose from; 0 is the finest.
    """

    levels: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Search(choices=((0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2)))
    ] = Field((0, 1, 2), min_length=1)


class WaveletParams(FrequencyParams):
    """Settings of ``wavelet``.

    Attributes:
        families: of PyWavelets, to choose from.
        levels: to choose from; 1 is the finest.
    """

    families: tuple[Annotated[str, AfterValidator(_wavelet_name)], ...] = Field(
        ("haar", "db2", "sym4", "bior2.2"), min_length=1
    )
    levels: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Search(choices=((1, 2, 3), (1,), (2,), (3,), (1, 2), (2, 3)))
    ] = Field((1, 2, 3), min_length=1)


class NotchParams(FrequencyParams):
    """Settings of ``notch``.

    Attributes:
        components: how many of the strongest periodic components vanish.
        width: deviation of each notch in bins of the spectrum.
    """

    components: Annotated[int, Search(1, 12, whole=True)] = Field(4, ge=1)
    width: Annotated[float, Search(0.5, 3, log=True)] = Field(1.0, gt=0)


class PeakParams(FrequencyParams):
    """Settings of ``peak``.

    Attributes:
        period_low, period_high: of the added component, in pixels, drawn log-uniformly.
        tint: largest difference of its weight between channels.
    """

    period_low: Annotated[float, Search(2, 10, log=True)] = Field(3.0, ge=2)
    period_high: Annotated[float, Search(10, 64, log=True)] = Field(24.0, ge=2)
    tint: Annotated[float, Search(0, 1)] = Field(0.3, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> PeakParams:
        if self.period_low > self.period_high:
            raise ValueError(f"period_low {self.period_low:g} exceeds period_high {self.period_high:g}")
        return self


class SharpenParams(FrequencyParams):
    """Settings of ``sharpen``.

    Attributes:
        sigma: deviation in pixels of what is taken as the unsharp picture.
    """

    sigma: Annotated[float, Search(0.5, 4, log=True)] = Field(1.5, gt=0)


class HighpassParams(FrequencyParams):
    """Settings of ``highpass``.

    Attributes:
        cutoff: radius over Nyquist at which half an amplitude is left; FAIR's 30 of the 128 bins of a picture
            of 256 pixels.
        order: of the Butterworth filter: how steeply it falls.
    """

    cutoff: Annotated[float, Search(0.05, 0.5, log=True)] = Field(0.23, gt=0)
    order: int = Field(2, ge=1, le=8)


@dataclass(frozen=True)
class Operator:
    """Attributes: ``render`` of :mod:`generation.frequency.operators`; ``arguments`` ``(rng, image, other,
    params)`` its noise; ``start`` a likely strength, ``limit`` the largest that makes sense; ``reach`` pixels
    from which content may be brought; ``bounded`` as of :func:`generation.severity.solved`."""

    render: Callable[..., Render]
    arguments: Callable[[np.random.Generator, np.ndarray, np.ndarray, Any], dict[str, Any]]
    start: float
    limit: float
    reach: int = CONTEXT
    bounded: bool = False


@dataclass(frozen=True)
class Window:
    """What is transformed: a box of the picture, and how many pixels of its mirror image are added above,
    below, left and right of it where the picture ends. Without them what lies at the opposite border, which
    the transform takes for the next pixel, would come into the mask."""

    box: Box
    added: tuple[int, int, int, int]

    def of(self, source: Source) -> np.ndarray:
        """float32 in [0, 1], h×w×C."""
        inner = source.crop(self.box)
        if not any(self.added):
            return inner
        grown = cv2.copyMakeBorder(inner, *self.added, cv2.BORDER_REFLECT_101)
        return grown.reshape(*grown.shape[:2], inner.shape[2])


@dataclass(frozen=True)
class FrequencyDraw:
    """Attributes: ``box`` and ``region`` of the mask; ``window`` that is transformed; ``arguments`` of the
    operator; ``edge`` the width of the soft edge in pixels; ``strength`` None if it is solved for; ``whole``
    whether the mask is all that is allowed, whatever area was asked for."""

    box: Box
    region: np.ndarray
    window: Window
    arguments: Mapping[str, Any]
    severity: float
    strength: float | None
    edge: int
    whole: bool


def draw(
    recipe: Recipe, source: Source, rng: np.random.Generator, operator: Operator, kind: type[FrequencyParams]
) -> FrequencyDraw:
    """A mask and the operator's noise on its box.

    Raises:
        PictureError: the picture is less than 4 pixels wide or high.
        UsageError: the recipe names no donor although the operator needs one.
        Undrawable: no room for the mask.
    """
    params = kind.of(recipe)
    height, width = source.allowed.shape
    if min(height, width) < SMALLEST:
        raise PictureError(
            f"a picture of {width}×{height} pixels has too few frequencies for {recipe.generator}: at least "
            f"{SMALLEST} pixels a side are needed"
        )
    box, region = shaped(rng, source.allowed, recipe.area, recipe.count, params.shape)
    window = _window(box, source.allowed.shape, operator.reach)
    image = window.of(source)
    other = _other(rng, recipe, source, image, params) if isinstance(params, OtherParams) else image
    arguments = operator.arguments(rng, image, other, params)
    size = math.sqrt(region.sum() / recipe.count / math.pi)
    edge = round(min(max(size / 4, 1), EDGE))
    whole = params.shape == "whole"
    return FrequencyDraw(box, region, window, arguments, recipe.severity, params.strength, edge, whole)


def apply(
    sources: Sequence[Source], draws: Sequence[FrequencyDraw], _model: Any, operator: Operator
) -> list[Edit]:
    return [_apply(source, one, operator) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: FrequencyDraw, operator: Operator) -> Edit:
    """I'' = (1 − soft mask)·I + soft mask·I'(strength)."""
    render = operator.render(one.window.of(source), **one.arguments)
    y0, y1, x0, x1 = one.box
    top, left = one.window.box[0] - one.window.added[0], one.window.box[2] - one.window.added[2]
    inner = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    places = places_of(one.box, one.region, source.pixels.shape[1])
    before = source.at(places.outer)
    weight = feather(one.region, one.edge).reshape(-1, 1).take(places.inner, axis=0)

    def patch(strength: float) -> np.ndarray:
        return before + weight * (stored(render(strength)[inner], places.inner) - before)

    if one.strength is not None:
        edit = Edit(one.box, np.clip(patch(one.strength), 0, 1), one.region)
    else:
        edit = solved(
            source,
            places,
            before,
            one.severity,
            patch,
            start=operator.start,
            limit=operator.limit,
            bounded=operator.bounded,
        )
    if not one.whole:
        return edit
    return replace(edit, measures={**edit.measures, "wanted_area": one.region.sum() / source.allowed.size})


def _window(box: Box, shape: tuple[int, ...], reach: int) -> Window:
    """A box with ``reach`` pixels around it, of sides that transform fast."""
    sides, added = [], []
    for (low, high), full in zip((box[:2], box[2:]), shape, strict=True):
        length = next_fast_len(high - low + 2 * reach, real=True)
        start = low - (length - (high - low)) // 2
        end = start + length
        sides += [max(start, 0), min(end, full)]
        added += [max(-start, 0), max(end - full, 0)]
    return Window((sides[0], sides[1], sides[2], sides[3]), (added[0], added[1], added[2], added[3]))


def _other(
    rng: np.random.Generator, recipe: Recipe, source: Source, image: np.ndarray, params: OtherParams
) -> np.ndarray:
    """A piece of the second picture, as large as the first: float32 in [0, 1]."""
    if params.other == "itself":
        return augment(rng, np.rint(255 * image).astype(np.uint8)).astype(np.float32) / np.float32(255)
    if not source.donors:
        raise UsageError(
            f"{recipe.generator} needs a second picture, but recipe {recipe.sample_id} names no donor: a "
            "source needs at least two good pictures (params.other: normals), or set generation.textures to "
            "a folder of pictures (params.other: folder)"
        )
    piece = cut(rng, source.donors[rng.integers(len(source.donors))], *image.shape[:2])
    return piece.astype(np.float32) / np.float32(np.iinfo(piece.dtype).max)


# -- the noise of each operator ---------------------------------------------------------------------------


def _band(
    rng: np.random.Generator, image: np.ndarray, _other: np.ndarray, params: BandParams
) -> dict[str, Any]:
    height, width = image.shape[:2]
    radius, middle = operators.radius(height, width), rng.uniform(0, math.pi)
    sector: Any = True
    if params.sector < 180:
        bearing = operators.bearing(height, width)
        away = np.abs((bearing - middle + math.pi / 2) % math.pi - math.pi / 2)
        sector = away <= math.radians(params.sector) / 2
    bands = [(radius >= low) & (radius < high) & (radius > 0) & sector for low, high in params.rings]
    bands = [band for band in bands if band.any()]  # a small box has no lowest frequencies
    if not bands:
        raise Undrawable("empty ring")
    band = bands[rng.integers(len(bands))]
    operators.mirror(band, 1, width)  # at Nyquist, which a ring may reach, k and −k lie in other directions
    gain = band * operators.hermitian(rng, height, width, sign=1) * np.float32(params.amplitude)
    turn = band * operators.hermitian(rng, height, width, sign=-1) * np.float32(params.phase)
    return {"gain": gain, "turn": turn}


def _swap(
    _rng: np.random.Generator, _image: np.ndarray, other: np.ndarray, params: SwapParams
) -> dict[str, Any]:
    return {"other": other, "reach": params.reach}


def _pair(
    _rng: np.random.Generator, _image: np.ndarray, other: np.ndarray, _params: OtherParams
) -> dict[str, Any]:
    return {"other": other}


def _mix(
    _rng: np.random.Generator, _image: np.ndarray, other: np.ndarray, params: MixParams
) -> dict[str, Any]:
    return {"other": other, "ratio": params.ratio}


def _laplacian(
    rng: np.random.Generator, image: np.ndarray, _other: np.ndarray, params: LaplacianParams
) -> dict[str, Any]:
    level = _level(rng, image, params.levels)
    sides = [-(-side // 2**level) for side in image.shape[:2]]
    return {"level": level, "noise": rng.standard_normal(sides, np.float32)}


def _wavelet(
    rng: np.random.Generator, image: np.ndarray, _other: np.ndarray, params: WaveletParams
) -> dict[str, Any]:
    name = params.families[rng.integers(len(params.families))]
    deepest = pywt.dwt_max_level(min(image.shape[:2]), name)
    if deepest < 1:  # the filter is longer than a picture of a few pixels
        name, deepest = "haar", 1
    level = min(_level(rng, image, params.levels), deepest)
    sides = [_coefficients(side, name, level) for side in image.shape[:2]]
    return {
        "family": name,
        "level": level,
        "direction": int(rng.integers(3)),
        "noise": rng.standard_normal(sides, np.float32),
    }


def _coefficients(side: int, name: str, level: int) -> int:
    for _ in range(level):
        side = pywt.dwt_coeff_len(side, pywt.Wavelet(name).dec_len, "symmetric")
    return side


def _level(rng: np.random.Generator, image: np.ndarray, levels: Sequence[int]) -> int:
    """One of the levels at which the picture still has some pixels; else the finest."""
    fitting = [level for level in levels if min(image.shape[:2]) >> level >= SMALLEST]
    return int(fitting[rng.integers(len(fitting))]) if fitting else min(levels)


def _notch(
    _rng: np.random.Generator, image: np.ndarray, _other: np.ndarray, params: NotchParams
) -> dict[str, Any]:
    return {"places": operators.peaks(image, params.components), "width": params.width}


def _peak(
    rng: np.random.Generator, image: np.ndarray, _other: np.ndarray, params: PeakParams
) -> dict[str, Any]:
    low, high = math.log(params.period_low), math.log(params.period_high)
    tint = params.tint if image.shape[2] > 1 else 0.0
    drawn = {
        "period": math.exp(rng.uniform(low, high)),
        "angle": rng.uniform(0, math.pi),
        "phase": rng.uniform(0, 2 * math.pi),
    }
    colour = np.ones(image.shape[2]) - tint * rng.random(image.shape[2])
    return {
        **drawn,
        "colour": (colour / colour.max()).astype(np.float32),
    }


def _nothing(
    _rng: np.random.Generator, _image: np.ndarray, _other: np.ndarray, _params: FrequencyParams
) -> dict[str, Any]:
    return {}


def _sharpen(
    _rng: np.random.Generator, _image: np.ndarray, _other: np.ndarray, params: SharpenParams
) -> dict[str, Any]:
    return {"sigma": params.sigma}


def _highpass(
    _rng: np.random.Generator, _image: np.ndarray, _other: np.ndarray, params: HighpassParams
) -> dict[str, Any]:
    return {"cutoff": params.cutoff, "order": params.order}


def _shift(
    rng: np.random.Generator, _image: np.ndarray, _other: np.ndarray, _params: FrequencyParams
) -> dict[str, Any]:
    return {"angle": rng.uniform(0, 2 * math.pi)}


def _donors(params: OtherParams) -> Donors:
    kinds: dict[str, Donors] = {"normals": "normal", "folder": "texture", "itself": "none"}
    return kinds[params.other]


def _generator(
    name: str, operator: Operator, params: type[FrequencyParams], defect: str, summary: str
) -> Generator:
    return Generator(
        name=name,
        family="frequency",
        summary=summary,
        draw=partial(draw, operator=operator, kind=params),
        apply=partial(apply, operator=operator),
        params=params,
        donors=_donors if issubclass(params, OtherParams) else "none",
        defect=defect,
    )


BAND = _generator(
    "band",
    Operator(operators.band, _band, 2.0, 40.0),
    BandParams,
    "disturbed texture",
    "perturbed amplitudes and phases of one band: disturbed weave, grain, gloss and print",
)
FDA = _generator(
    "fda",
    Operator(operators.swap, _swap, 1.0, 8.0),
    SwapParams,
    "uneven tone",
    "low amplitudes of another picture (FDA): uneven tone, shade and coating",
)
FACT = _generator(
    "fact",
    Operator(operators.mix, _mix, 1.0, 8.0),
    MixParams,
    "foreign texture",
    "amplitudes mixed with another picture's (FACT): foreign grain and finish",
)
APR = _generator(
    "apr",
    Operator(operators.recombine, _pair, 0.5, 1.0, bounded=True),
    OtherParams,
    "foreign structure",
    "the phase of another picture (APR): misplaced structure in the material's own tones",
)
LAPLACIAN = _generator(
    "laplacian",
    Operator(operators.laplacian, _laplacian, 2.0, 60.0),
    LaplacianParams,
    "disturbed grain",
    "noise on one level of the Laplacian pyramid: roughened grain, pitting",
)
WAVELET = _generator(
    "wavelet",
    Operator(operators.wavelet, _wavelet, 3.0, 80.0),
    WaveletParams,
    "disturbed grain",
    "noise on wavelet details of one scale and direction: oriented grain faults, streaks",
)
NOTCH = _generator(
    "notch",
    Operator(operators.notch, _notch, 0.5, 1.0, bounded=True),
    NotchParams,
    "missing weave",
    "periodic components missing: skipped threads, worn print, filled grooves",
)
PEAK = _generator(
    "peak",
    Operator(operators.peak, _peak, 0.1, 1.0),
    PeakParams,
    "added pattern",
    "a periodic component added: moire, banding, chatter marks",
)
BLUR = _generator(
    "blur",
    Operator(operators.blur, _nothing, 2.0, 8.0, reach=24, bounded=True),
    FrequencyParams,
    "blurred area",
    "a local low-pass: worn, smeared or polished places",
)
SHARPEN = _generator(
    "sharpen",
    Operator(operators.sharpen, _sharpen, 2.0, 40.0),
    SharpenParams,
    "rough area",
    "a local high boost: roughened, etched or dried places",
)
HIGHPASS = _generator(
    "highpass",
    Operator(operators.highpass, _highpass, 0.5, 1.0, reach=24, bounded=True),
    HighpassParams,
    "flat tone",
    "a local high-pass (FAIR): shading and blotches gone, grain and edges left",
)
SHIFT = _generator(
    "shift",
    Operator(operators.shift, _shift, 2.0, 32.0, reach=32, bounded=True),
    FrequencyParams,
    "misaligned pattern",
    "the pattern moved by its phase: misprint, slipped weave, offset joints",
)
