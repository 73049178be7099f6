"""Tone mapping of HDR video (PQ, HLG) to BT.709 SDR.

    Y'CbCr → R'G'B' → (EOTF) cd/m² → (primaries) BT.709 → (tone curve) 0 … 1 → (power 1/2.4) 8 bits

PQ and HLG signals become display light as in ITU-R BT.2100-2: PQ by its EOTF, HLG by the inverse OETF and the OOTF of a
display of 1000 cd/m² (gamma 1.2). Chromaticities are converted to BT.709 in linear light; what is outside its gamut is
clipped. The tone curve maps the largest component and scales all three alike, so that hues are kept and nothing exceeds
the peak. SDR white is 100 cd/m², encoded with the inverse of the EOTF of ITU-R BT.1886 (gamma 2.4, black at 0). The
peak of the source is that of the file, see ``PictureInfo.peak``, equal for all its frames: no frame depends on others.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from blueberry_video.video.ranges import check_choice

CURVES = ("bt2390", "hable")
SDR_WHITE = 100.0  # cd/m²
PQ_PEAK, HLG_PEAK = 10_000.0, 1000.0  # cd/m²
_MOST = 2**16 - 1  # code of the signal 1
_HLG_GAMMA = 1.2  # of a display of 1000 cd/m²
_SDR_GAMMA = 2.4

_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_A = 0.17883277
_B, _C = 1 - 4 * _A, 0.5 - _A * np.log(4 * _A)
_BT2020_LUMA = (0.2627, 0.6780, 0.0593)  # of the HLG OOTF

_LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # of R and B, by ITU-T H.273
_UNSPECIFIED = 2
_D65 = (0.3127, 0.3290)
_CHROMATICITIES = {  # of R, G, B, all with the white point D65
    "bt709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "smpte432": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}


def pq_to_luminance(signal: Tensor) -> Tensor:
    """PQ EOTF of ITU-R BT.2100-2, table 4: signal in 0 … 1 → cd/m² in 0 … 10,000, any shape."""
    power = signal.clamp(0, 1) ** (1 / _M2)
    return PQ_PEAK * ((power - _C1).clamp(min=0) / (_C2 - _C3 * power)) ** (1 / _M1)


def luminance_to_pq(luminance: Tensor) -> Tensor:
    """Inverse PQ EOTF of ITU-R BT.2100-2, table 4: cd/m² in 0 … 10,000 → signal in 0 … 1, any shape."""
    power = (luminance / PQ_PEAK).clamp(0, 1) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def hlg_to_scene(signal: Tensor) -> Tensor:
    """Inverse HLG OETF of ITU-R BT.2100-2, table 5: signal in 0 … 1 → scene light in 0 … 1, any shape."""
    signal = signal.clamp(0, 1)
    return torch.where(signal <= 0.5, signal**2 / 3, (torch.exp((signal - _C) / _A) + _B) / 12)


def hlg_to_luminance(scene: Tensor) -> Tensor:
    """HLG OOTF of ITU-R BT.2100-2, table 5, for a display of 1000 cd/m² and black 0: scene light (…, 3) of BT.2020 in
    0 … 1 → cd/m² (…, 3)."""
    luma = scene @ scene.new_tensor(_BT2020_LUMA)
    return HLG_PEAK * luma[..., None] ** (_HLG_GAMMA - 1) * scene


def bt2390(luminance: Tensor, peak: float, target: float = SDR_WHITE) -> Tensor:
    """EETF of Report ITU-R BT.2390-11, 5.4.1: cd/m² up to ``peak`` → cd/m² up to ``target``, both with black 0.

    Identity below the knee and a Hermite spline above it, both in the PQ domain.
    """
    top = float(luminance_to_pq(torch.tensor(peak, dtype=torch.float64)))
    most = float(luminance_to_pq(torch.tensor(target, dtype=torch.float64))) / top
    if most >= 1:
        return luminance.clamp(max=peak)
    knee = 1.5 * most - 0.5
    level = (luminance_to_pq(luminance) / top).clamp(max=1)
    t = (level - knee) / (1 - knee)
    square, cube = t**2, t**3
    spline = (2 * cube - 3 * square + 1) * knee + (cube - 2 * square + t) * (1 - knee) + (3 * square - 2 * cube) * most
    return torch.where(level < knee, luminance, pq_to_luminance(spline * top))


def hable(luminance: Tensor, peak: float, target: float = SDR_WHITE) -> Tensor:
    """Filmic curve of J. Hable (GDC 2010) with the constants of FFmpeg's ``tonemap=hable``: cd/m² → cd/m², ``peak`` to
    ``target``."""

    def curve(x: Tensor) -> Tensor:
        return (x * (0.15 * x + 0.05) + 0.004) / (x * (0.15 * x + 0.5) + 0.06) - 0.02 / 0.3

    most = curve(torch.tensor(peak / target, dtype=luminance.dtype))
    return target * curve(luminance.clamp(max=peak) / target) / most


def to_bt709(primaries: str) -> Tensor:
    """Matrix from linear RGB of some primaries to linear RGB of BT.709, float64 (3, 3), from the chromaticities.

    Args:
        primaries: ``bt709``, ``bt2020`` or ``smpte432``.

    Raises:
        ValueError: other primaries.
    """
    check_choice("primaries", primaries, _CHROMATICITIES)
    return torch.linalg.inv(_to_xyz("bt709")) @ _to_xyz(primaries)


def _to_xyz(primaries: str) -> Tensor:
    columns = [(x / y, 1.0, (1 - x - y) / y) for x, y in (*_CHROMATICITIES[primaries], _D65)]
    *colors, white = torch.tensor(columns, dtype=torch.float64)
    matrix = torch.stack(colors, dim=1)
    return matrix * torch.linalg.solve(matrix, white)


class ToneMap:
    """Tone mapping of the frames of one video.

    Args:
        curve: ``bt2390`` or ``hable``.
        hdr: ``pq`` or ``hlg``, the transfer characteristics.
        primaries: FFmpeg's name, see :func:`to_bt709`; None, where the file states none, is ``bt2020``.
        peak: cd/m² of the brightest color.

    Raises:
        ValueError: an unknown curve, or primaries without a conversion.
    """

    def __init__(self, curve: str, hdr: str, primaries: str | None, peak: float):
        check_choice("tone_map", curve, CURVES)
        self._curve, self._hdr, self._peak = {"bt2390": bt2390, "hable": hable}[curve], hdr, peak
        self._matrix = to_bt709(primaries or "bt2020").float()

    def __call__(self, signal: Tensor) -> np.ndarray:
        """Maps float32 R'G'B' signals (3, H, W) in 0 … 1 to uint8 (H, W, 3) R'G'B' of BT.709."""
        codes = (signal.clamp(0, 1) * _MOST).round().int().flatten()
        light = _light(self._hdr).index_select(0, codes).view(3, -1)
        linear = self._matrix @ (hlg_to_luminance(light.T).T if self._hdr == "hlg" else light)
        brightest = linear.amax(dim=0).clamp(min=1e-6)
        linear *= self._curve(brightest.clamp(max=self._peak), self._peak) / (brightest * SDR_WHITE)
        levels = (linear.clamp_(0, 1) ** (1 / _SDR_GAMMA)).mul_(255).round_().to(torch.uint8)
        return levels.view(signal.shape).permute(1, 2, 0).contiguous().numpy()


def rgb_signal(samples: np.ndarray, bits: int, matrix: int, is_full_range: bool) -> Tensor:
    """Converts Y'CbCr to R'G'B', as in ITU-R BT.2100-2, tables 6 and 9.

    Args:
        samples: uint16 (H, W, 3), shifted up to 16 bits.
        bits: of the samples before that.
        matrix: number of the matrix in ITU-T H.273; 2, unspecified, is that of BT.2020.
        is_full_range: whether black and white are the lowest and the highest code.

    Returns:
        Float32 (3, H, W), nominally 0 … 1.

    Raises:
        ValueError: a matrix without a conversion: ICtCp, constant luminance and others.
    """
    if (number := 9 if matrix == _UNSPECIFIED else matrix) not in _LUMA:
        raise ValueError(f"tone_map supports no Y'CbCr of matrix {matrix} (ITU-T H.273): set tone_map=none")
    red, blue = _LUMA[number]
    luma, *chroma = torch.from_numpy(samples.astype(np.float32)).permute(2, 0, 1) / 2 ** (16 - bits)
    step, most = 2 ** (bits - 8), 2**bits - 1
    black, luma_range, chroma_range = (0, most, most) if is_full_range else (16 * step, 219 * step, 224 * step)
    y = (luma - black) / luma_range
    cb, cr = ((plane - 128 * step) / chroma_range for plane in chroma)
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return torch.stack((r, (y - red * r - blue * b) / (1 - red - blue), b))


@functools.cache
def _light(hdr: str) -> Tensor:
    """Light of each 16-bit signal, float32 (65536,): cd/m² for PQ, scene light for HLG."""
    signal = torch.arange(2**16, dtype=torch.float64) / _MOST
    return (pq_to_luminance(signal) if hdr == "pq" else hlg_to_scene(signal)).float()
