"""The operators of the frequency family: pictures in, a picture of any strength out (core.md 5.5).

Each takes a float32 H×W×C picture in [0, 1] (at least 2×2) and its own noise, does once what does not depend
on the strength, and returns ``render(strength) -> float32 H×W×C``, not clipped: the picture itself at 0. All
channels get the same noise, so that the colours hold together and a grey picture is treated like its
channels. Frequency 0 is left alone, so the mean colour stays, but for :func:`laplacian` and :func:`wavelet`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pywt
from scipy.fft import irfft2, rfft2

ROUNDING = 1e-6  # of the largest amplitude; below it a spectrum in float32 holds nothing else
STEEPEST = 8.0  # logarithm of the most that an amplitude is multiplied by
LEAK = 2  # bins over which a component that is no whole number of periods spreads its amplitude
OUTSTANDING = 2.5  # times the mean of its ring that an amplitude must be to count as a periodic component

Render = Callable[[float], np.ndarray]


def band(image: np.ndarray, gain: np.ndarray, turn: np.ndarray) -> Render:
    """Perturbed band [inferred]: amplitude · exp(s·gain), phase + s·turn.

    Args:
        gain, turn: float32, H×(W // 2 + 1); :func:`hermitian` noise of sign 1 and −1, 0 outside the band.
    """
    spectrum = _spectrum(image)
    # What rounding leaves of an empty band is no texture to be disturbed.
    spectrum[np.abs(spectrum) < ROUNDING * np.abs(spectrum).max(initial=0)] = 0

    def render(strength: float) -> np.ndarray:
        s = np.float32(strength)
        growth = np.exp(np.clip(s * gain, -STEEPEST, STEEPEST)) * _turned(s * turn)
        return _picture(spectrum * growth[..., None], image)

    return render


def swap(image: np.ndarray, other: np.ndarray, reach: float) -> Render:
    """FDA (Yang and Soatto 2020): the low amplitudes of another picture, the phase of this one.

    Args:
        other: as large as ``image``.
        reach: L; the square of half side ⌊min(H, W)·L⌋ around frequency 0, without it [inferred], is
            swapped. s = 1 is the published swap; below and beyond it see :func:`_amplitudes`.
    """
    half = max(1, math.floor(min(image.shape[:2]) * reach))
    rows, columns = _bins(image.shape)
    return _amplitudes(image, other, (np.abs(rows) <= half) & (columns <= half))


def mix(image: np.ndarray, other: np.ndarray, ratio: float) -> Render:
    """FACT (Xu et al. 2021): 𝒜' = (1 − s)·𝒜 + s·𝒜_other; phase of this picture. Beyond s = 1 see
    :func:`_amplitudes`.

    Args:
        other: as large as ``image``.
        ratio: of the spectrum that is mixed, in (0, 1]: √ratio of each side around frequency 0, without it
            [inferred]; 1 is all.
    """
    rows, columns = _bins(image.shape)
    reach = [math.sqrt(ratio) * side / 2 for side in image.shape[:2]]
    return _amplitudes(image, other, (np.abs(rows) <= reach[0]) & (columns <= reach[1]))


def recombine(image: np.ndarray, other: np.ndarray) -> Render:
    """APR (Chen et al. 2021): the amplitude of this picture, the phase of another at s = 1, on the way there
    (the shorter way round each circle, and along the real line where a bin mirrors itself [inferred]) below
    it. Frequency 0 stays [inferred]."""
    spectrum = _spectrum(image)
    turn = np.angle(_spectrum(other) * np.conj(spectrum)).astype(np.float32)
    alone = mirror(turn, -1, image.shape[1])
    turn[0, 0] = 0

    def render(strength: float) -> np.ndarray:
        factor = _turned(np.float32(strength) * turn)
        factor.imag[alone] = 0
        return _picture(spectrum * factor, image)

    return render


def laplacian(image: np.ndarray, level: int, noise: np.ndarray) -> Render:
    """A level of the Laplacian pyramid, each coefficient times 1 + s·noise (Burt and Adelson 1983). What is
    added has a mean of its own, so the mean colour moves a little.

    Args:
        level: from 0, the finest.
        noise: float32, as large as that level (a side is halved and rounded up at each).
    """
    fine = image
    for _ in range(level):
        fine = cv2.pyrDown(fine).reshape(*(-(-side // 2) for side in fine.shape[:2]), -1)
    height, width = fine.shape[:2]
    smooth = cv2.pyrUp(cv2.pyrDown(fine), dstsize=(width, height)).reshape(fine.shape)
    change = (fine - smooth) * noise[..., None]
    for at in range(level - 1, -1, -1):
        sides = [-(-side // 2**at) for side in image.shape[:2]]
        change = cv2.pyrUp(change, dstsize=(sides[1], sides[0])).reshape(*sides, -1)
    return _add(image, change)


def wavelet(image: np.ndarray, family: str, level: int, direction: int, noise: np.ndarray) -> Render:
    """The detail coefficients of one level and direction, each times 1 + s·noise. Beyond a picture's border
    they are mirrored, so the mean colour moves a little.

    Args:
        family: of PyWavelets: ``haar``, ``db2``, ``sym4``, ``bior2.2``, …
        level: from 1, the finest.
        direction: 0 horizontal, 1 vertical, 2 diagonal details.
        noise: float32, at least as large as those coefficients; the top left part is taken.
    """
    approximation, *details = pywt.wavedec2(image, family, mode="symmetric", level=level, axes=(0, 1))
    chosen = details[0][direction]
    change = chosen * noise[: chosen.shape[0], : chosen.shape[1], None]
    empty = [[np.zeros_like(part) for part in triple] for triple in details]
    empty[0][direction] = change
    parts = [np.zeros_like(approximation), *(tuple(triple) for triple in empty)]
    changed = pywt.waverec2(parts, family, mode="symmetric", axes=(0, 1))
    return _add(image, changed[: image.shape[0], : image.shape[1]].astype(np.float32))


def notch(image: np.ndarray, places: np.ndarray, width: float) -> Render:
    """Periodic components missing: amplitudes · (1 − s) around some frequencies (s = 1: gone).

    Args:
        places: int, n×2; their bins (row, column) in the half spectrum.
        width: deviation of the Gaussian notch in bins.
    """
    rows, columns = _bins(image.shape)
    far = np.full((image.shape[0], image.shape[1] // 2 + 1), np.inf)
    for row, column in places:
        for sign in (1, -1):  # the mirrored bin too
            distances = (np.abs(rows - sign * rows[row, 0]), np.abs(columns - sign * column))
            dy, dx = (np.minimum(d, n - d) for d, n in zip(distances, image.shape, strict=False))
            far = np.minimum(far, dy**2 + dx**2)
    dip = np.exp(-far / (2 * width**2)).astype(np.float32)
    dip[0, 0] = 0
    return _add(image, -_picture(_spectrum(image) * dip[..., None], image))


def peaks(image: np.ndarray, count: int) -> np.ndarray:
    """The strongest periodic components: bins of the half spectrum with the largest amplitudes among those
    that stand out from the mean of their ring. int, n×2, n <= ``count``; frequencies below 2 bins are left
    out, and so are the bins next to a stronger one, into which its amplitude leaks. Of a component and its
    mirror image one is named."""
    amplitude = np.abs(_spectrum(image)).sum(axis=2)
    rows, columns = _bins(image.shape)
    ring = np.rint(np.hypot(rows, columns)).astype(np.int64)
    counts = np.maximum(np.bincount(ring.ravel()), 1)
    mean = np.bincount(ring.ravel(), amplitude.ravel()) / counts
    outstanding = np.where((ring >= 2) & (amplitude > OUTSTANDING * mean[ring]), amplitude, 0)
    found: list[tuple[int, int]] = []
    for at in np.argsort(-outstanding, axis=None, kind="stable")[: np.count_nonzero(outstanding)]:
        row, column = (int(i) for i in np.unravel_index(at, amplitude.shape))
        if not any(_near((row, column), other, image.shape) for other in found):
            found.append((row, column))
        if len(found) == count:
            break
    return np.array(found, np.int64).reshape(-1, 2)


def peak(image: np.ndarray, period: float, angle: float, phase: float, colour: np.ndarray) -> Render:
    """A periodic component added: moiré, banding, a repeated fault of the weave.

    Args:
        period: in pixels.
        angle: of its direction, in radians.
        phase: in radians.
        colour: float32, C; weight in each channel, the largest 1.
    """
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    along = (x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))) / np.float32(period)
    wave = np.cos(np.float32(2 * math.pi) * along + np.float32(phase))
    return _add(image, (wave - wave.mean())[..., None] * colour)


def blur(image: np.ndarray) -> Render:
    """Out of focus or worn: a Gaussian low-pass whose deviation is the strength in pixels."""
    spectrum, squared = _spectrum(image), _squared(image.shape)
    return lambda strength: _picture(
        spectrum * np.exp(np.float32(-2 * (math.pi * strength) ** 2) * squared)[..., None], image
    )


def sharpen(image: np.ndarray, sigma: float) -> Render:
    """Over-sharpened: what a Gaussian of ``sigma`` pixels takes away, added s times."""
    low = np.exp(np.float32(-2 * (math.pi * sigma) ** 2) * _squared(image.shape))[..., None]
    return _add(image, _picture(_spectrum(image) * (1 - low), image))


def highpass(image: np.ndarray, cutoff: float, order: int) -> Render:
    """The low frequencies lost: amplitudes · (1 − s·(1 − H)), Butterworth's H = 1 / (1 + (d/ρ)^2n), as FAIR
    filters its pictures, at s = 1; frequency 0 stays [inferred].

    Args:
        cutoff: d, a radius over Nyquist, as ρ is. order: n.
    """
    ratio = cutoff / np.maximum(radius(*image.shape[:2]), 1e-9)
    lost = 1 - 1 / (1 + ratio ** (2 * order))
    lost[0, 0] = 0
    return _add(image, -_picture(_spectrum(image) * lost.astype(np.float32)[..., None], image))


def shift(image: np.ndarray, angle: float) -> Render:
    """A misaligned pattern: moved by s pixels through the phase alone, periodic at the picture's border."""
    y, x = np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])[None]
    ramp = (-2 * math.pi * (x * math.cos(angle) + y * math.sin(angle))).astype(np.float32)[..., None]
    for axis, side in enumerate(image.shape[:2]):  # what is its own mirror has no direction to move in
        if side % 2 == 0:
            ramp[(side // 2, slice(None)) if axis == 0 else (slice(None), side // 2)] = 0
    spectrum = _spectrum(image)
    return lambda strength: _picture(spectrum * _turned(np.float32(strength) * ramp), image)


def hermitian(rng: np.random.Generator, height: int, width: int, sign: int) -> np.ndarray:
    """White noise on the half spectrum of a real picture, even (sign 1) or odd (sign −1) under negation.

    The columns of frequency 0 and, for an even width, Nyquist hold both k and −k: the second half mirrors
    the first, and in the odd case what mirrors itself is 0.

    Returns:
        float32, height×(width // 2 + 1).
    """
    noise = rng.standard_normal((height, width // 2 + 1), np.float32)
    alone = mirror(noise, sign, width)
    if sign < 0:
        noise[alone] = 0
    return noise


def radius(height: int, width: int) -> np.ndarray:
    """Radius of each frequency of the half spectrum over Nyquist: float, height×(width // 2 + 1)."""
    return np.hypot(2 * np.fft.fftfreq(height)[:, None], 2 * np.fft.rfftfreq(width)[None, :])


def bearing(height: int, width: int) -> np.ndarray:
    """Direction of each frequency of the half spectrum, in [0, π): float, height×(width // 2 + 1)."""
    return np.arctan2(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]) % math.pi


def _amplitudes(image: np.ndarray, other: np.ndarray, chosen: np.ndarray) -> Render:
    """𝒜' = max(𝒜 + s·(𝒜_other − 𝒜), 0) where ``chosen``, the phase kept: the other's at s = 1, and beyond it
    as far again in the same direction, where the severity asks for more [inferred]."""
    spectrum = _spectrum(image)
    amplitude = np.abs(spectrum)
    unit = np.where(amplitude > 0, spectrum / np.maximum(amplitude, 1e-12), 1)
    chosen = chosen.copy()
    chosen[0, 0] = False
    step = (np.abs(_spectrum(other)) - amplitude) * chosen[..., None]
    return lambda s: _picture(unit * np.maximum(amplitude + np.float32(s) * step, 0), image)


def _add(image: np.ndarray, change: np.ndarray) -> Render:
    return lambda strength: image + np.float32(strength) * change


def _near(one: tuple[int, int], other: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether two bins are within LEAK bins of each other, or of each other's mirror images."""
    for sign in (1, -1):
        steps = [abs(a - sign * b) % n for a, b, n in zip(one, other, shape, strict=False)]
        if all(min(step, n - step) <= LEAK for step, n in zip(steps, shape, strict=False)):
            return True
    return False


def mirror(values: np.ndarray, sign: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Make a half spectrum even (sign 1) or odd (−1) under negation, in place: the columns of frequency 0
    and, for an even width, Nyquist hold both k and −k, and there the second half mirrors the first.

    Returns:
        the places, rows and columns, of the bins that mirror themselves and are left as they were.
    """
    rows = np.arange(len(values))
    mirror = -rows % len(values)
    both = [0, width // 2] if width % 2 == 0 else [0]
    for column in both:
        late = rows > mirror
        values[late, column] = sign * values[mirror[late], column]
    alone = np.flatnonzero(rows == mirror)
    return np.repeat(alone, len(both)), np.tile(both, len(alone))


def _turned(angle: np.ndarray) -> np.ndarray:
    """exp(i·angle), float32 to complex64; numpy's complex exponential takes forty times as long."""
    result = np.empty(angle.shape, np.complex64)
    np.cos(angle, out=result.real)
    np.sin(angle, out=result.imag)
    return result


def _spectrum(image: np.ndarray) -> np.ndarray:
    return rfft2(image, axes=(0, 1))


def _picture(spectrum: np.ndarray, like: np.ndarray) -> np.ndarray:
    return irfft2(spectrum, s=like.shape[:2], axes=(0, 1)).astype(np.float32, copy=False)


def _bins(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Signed row and column of each bin of the half spectrum: H×1 and 1×(W // 2 + 1)."""
    rows = np.rint(np.fft.fftfreq(shape[0]) * shape[0]).astype(np.int64)[:, None]
    return rows, np.arange(shape[1] // 2 + 1)[None, :]


def _squared(shape: tuple[int, ...]) -> np.ndarray:
    """Squared frequency in cycles a pixel: float32, H×(W // 2 + 1)."""
    y, x = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]
    return (y * y + x * x).astype(np.float32)
