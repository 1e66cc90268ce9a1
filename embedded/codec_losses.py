"""What the toy codec is trained for: spectra at several resolutions, harmonics, intelligibility."""

from __future__ import annotations

import librosa
import torch
from torch import nn
from torch.nn import functional as F

from embedded.codec_model import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

#: Points of the FFT -> (hop, window, mel bands).
_RESOLUTIONS = {2048: (480, 1200, 100), 1024: (240, 600, 80), 512: (120, 240, 40), 256: (60, 120, 20)}
#: Windows long enough to tell harmonics of 80 Hz apart (a window of n samples resolves about 4 * 24000 / n Hz).
_HARMONIC_WINDOWS = (2048, 4096)
_HARMONIC_MAX_HZ = 4000


#: Short-time objective intelligibility (Taal et al. 2011): samples of a window and between windows (25.6 ms and half of
#: it), third-octave bands from 150 Hz, windows that are compared together (384 ms).
_STOI_WINDOW, _STOI_HOP, _STOI_POINTS = 614, 307, 1024
_STOI_BANDS, _STOI_LOWEST_HZ, _STOI_STEPS = 15, 150.0, 30


def _magnitudes(waveforms: torch.Tensor, points: int, hop: int, window: torch.Tensor) -> torch.Tensor:
    spectrum = torch.stft(waveforms, points, hop, len(window), window, return_complex=True)
    return torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-7)


def _mel_bands(points: int, bands: int, low_hz: float, high_hz: float) -> torch.Tensor:
    return torch.tensor(librosa.filters.mel(sr=SAMPLE_RATE_HZ, n_fft=points, n_mels=bands, fmin=low_hz, fmax=high_hz))


class SpectralLoss(nn.Module):
    """L1 of log-mel and log-linear spectra and the relative error of linear ones, over four resolutions, and the same
    for harmonics; lower is nearer."""

    def __init__(self) -> None:
        super().__init__()
        for points, (_, window, bands) in _RESOLUTIONS.items():
            self.register_buffer(f"window_{points}", torch.hann_window(window))
            self.register_buffer(f"bands_{points}", _mel_bands(points, bands, 0, 12_000))
        for points in _HARMONIC_WINDOWS:
            self.register_buffer(f"harmonic_{points}", torch.hann_window(points))

    def forward(self, made: torch.Tensor, true: torch.Tensor) -> dict[str, torch.Tensor]:
        """(batch, samples) each; the parts: mel, linear, relative, harmonic."""
        parts = [self._at(points, made, true) for points in _RESOLUTIONS]
        mel, linear, relative = (sum(part) / len(parts) for part in zip(*parts, strict=True))
        harmonic = sum(self._harmonic(points, made, true) for points in _HARMONIC_WINDOWS) / len(_HARMONIC_WINDOWS)
        return {"mel": mel, "linear": linear, "relative": relative, "harmonic": harmonic}

    def _at(self, points: int, made: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hop, window = _RESOLUTIONS[points][0], getattr(self, f"window_{points}")
        bands = getattr(self, f"bands_{points}")
        one, other = (_magnitudes(waveforms, points, hop, window) for waveforms in (made, true))
        mel = F.l1_loss(torch.log(bands @ one + 1e-3), torch.log(bands @ other + 1e-3))
        linear = F.l1_loss(torch.log(one + 1e-2), torch.log(other + 1e-2))
        relative = torch.linalg.norm(one - other) / (torch.linalg.norm(other) + 1e-3)
        return mel, linear, relative

    def _harmonic(self, points: int, made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        """Differences at voiced places only matter where there is energy: weighted by the true magnitude."""
        window, num_bins = getattr(self, f"harmonic_{points}"), _HARMONIC_MAX_HZ * points // SAMPLE_RATE_HZ
        one, other = (_magnitudes(x, points, points // 4, window)[:, :num_bins] for x in (made, true))
        difference = (torch.log(one + 3e-2) - torch.log(other + 3e-2)).abs()
        loudness = other.mean(1, keepdim=True)
        return (difference * loudness).mean() / (loudness.mean() + 1e-6)


class IntelligibilityLoss(nn.Module):
    """1 - STOI, but for what does not differentiate: nothing is clipped, and silence is left out by whole segments."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_STOI_WINDOW))
        frequencies = torch.arange(_STOI_POINTS // 2 + 1) * SAMPLE_RATE_HZ / _STOI_POINTS
        centers = _STOI_LOWEST_HZ * 2 ** (torch.arange(_STOI_BANDS)[:, None] / 3)
        is_inside = (frequencies >= centers * 2 ** (-1 / 6)) & (frequencies < centers * 2 ** (1 / 6))
        self.register_buffer("bands", is_inside.float())

    def forward(self, made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        """(batch, samples) each, at least 0.4 s."""
        one, other = (self._segments(waveforms) for waveforms in (made, true))
        energy = other.pow(2).sum((1, 3))  # (batch, segments)
        is_loud = (energy > 1e-3 * energy.max()).float()[:, None]
        centered = [segments - segments.mean(-1, keepdim=True) for segments in (one, other)]
        norms = [segments.norm(dim=-1) + 1e-3 for segments in centered]
        correlation = (centered[0] * centered[1]).sum(-1) / (norms[0] * norms[1])  # (batch, bands, segments)
        return 1 - (correlation * is_loud).sum() / (is_loud.sum() * _STOI_BANDS)

    def _segments(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(batch, bands, segments, _STOI_STEPS) magnitudes."""
        power = _magnitudes(waveforms, _STOI_POINTS, _STOI_HOP, self.window) ** 2
        return torch.sqrt(self.bands @ power).unfold(-1, _STOI_STEPS, 2)


class LatentTargets(nn.Module):
    """What the auxiliary heads predict of each frame: log-mels at two resolutions, and harmonics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bands", _mel_bands(1024, 40, 60, 10_000))
        for name, size in (("twin", 1024), ("fine", 512), ("harmonic", 2048)):
            self.register_buffer(f"{name}_window", torch.hann_window(size))

    def of_twin(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(batch, frames * 1920) to (batch, frames, TWIN_WIDTH), four steps a frame."""
        return _by_frame(torch.log(self.bands @ _magnitudes(waveforms, 1024, 480, self.twin_window) + 1e-2), 480)

    def of_clip(self, waveforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, frames * 1920) to (batch, frames, FINE_WIDTH), eight steps a frame, and harmonics (batch, frames,
        HARMONIC_WIDTH), two."""
        fine = torch.log(self.bands @ _magnitudes(waveforms, 1024, 240, self.fine_window) + 1e-2)
        harmonic = torch.log(_magnitudes(waveforms, 2048, 960, self.harmonic_window)[:, 4:104] + 3e-2)
        return _by_frame(fine, 240), _by_frame(harmonic, 960)


def _by_frame(spectrum: torch.Tensor, hop: int) -> torch.Tensor:
    """(batch, bands, steps) to (batch, frames, steps per frame * bands)."""
    per_frame = SAMPLES_PER_FRAME // hop
    num_frames = spectrum.shape[2] // per_frame
    return spectrum[..., : num_frames * per_frame].transpose(1, 2).reshape(spectrum.shape[0], num_frames, -1)
