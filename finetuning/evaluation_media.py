"""What a report shows of a waveform, as bytes that stand in the page: MP3, a picture of the sound, a plot of figures.

MP3 because every browser plays it; the wav files stay beside the report.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ

#: Spectrograms: bands from top to bottom, columns a second, columns at most (longer speech is squeezed), and how far
#: below the loudest point everything is black.
NUM_BANDS, COLUMNS_PER_SECOND, MAX_COLUMNS, RANGE_DB = 72, 40, 1600, 65.0
#: Shades of a spectrogram; more look no different and take more bytes.
NUM_SHADES = 32
_FFT_SAMPLES = 1024
#: Colours of the palette from silence to the loudest, evenly spaced.
_COLOURS = ((8, 10, 30), (62, 18, 96), (150, 38, 100), (229, 92, 48), (252, 190, 60), (252, 252, 200))


def mp3(waveform: np.ndarray) -> bytes:
    """(num_samples,) float32 at 24 kHz as a mono MP3 of variable bit rate (about 9 KB a second)."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(
        stream, np.clip(waveform, -1.0, 1.0), SAMPLE_RATE_HZ, format="MP3", compression_level=0.2,
        bitrate_mode="VARIABLE",
    )  # fmt: skip
    return stream.getvalue()


def wav(waveform: np.ndarray) -> bytes:
    """(num_samples,) float32 at 24 kHz as a 16-bit wav file."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, np.clip(waveform, -1.0, 1.0), SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def spectrogram_png(waveform: np.ndarray) -> bytes:
    """(num_samples,) at 24 kHz -> a PNG of its loudness by time (40 columns a second) and frequency (mel)."""
    levels = np.clip(1.0 + _bands_db(waveform) / RANGE_DB, 0.0, 1.0)
    shades = np.round(levels * (NUM_SHADES - 1)).astype(np.uint8)
    return _png(shades.T[::-1], _palette())


def _bands_db(waveform: np.ndarray) -> np.ndarray:
    """(num_columns, NUM_BANDS) dB below the loudest point."""
    hop = max(SAMPLE_RATE_HZ // COLUMNS_PER_SECOND, -(-len(waveform) // MAX_COLUMNS))
    starts = np.arange(0, max(len(waveform), 1), hop)
    padded = np.pad(waveform.astype(np.float64), (_FFT_SAMPLES // 2, _FFT_SAMPLES))
    pieces = padded[starts[:, None] + np.arange(_FFT_SAMPLES)] * np.hanning(_FFT_SAMPLES)
    power = np.abs(np.fft.rfft(pieces)) ** 2
    edges = _band_edges(power.shape[1])
    sums = np.add.reduceat(power, edges[:-1], axis=1)
    decibels = 10 * np.log10(sums / np.diff(edges) + 1e-12)
    return decibels - decibels.max()


def _band_edges(num_bins: int) -> np.ndarray:
    """(NUM_BANDS + 1,) places in the spectrum, evenly spaced in mel where that is wide enough for a bin."""
    top_mel = 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top_mel, NUM_BANDS + 1) / 2595) - 1)
    edges = np.floor(hertz / (SAMPLE_RATE_HZ / 2) * (num_bins - 1)).astype(int)
    for place in range(1, NUM_BANDS + 1):
        edges[place] = max(edges[place], edges[place - 1] + 1)
    return edges


def _palette() -> np.ndarray:
    """(NUM_SHADES, 3) uint8."""
    places = np.linspace(0, len(_COLOURS) - 1, NUM_SHADES)
    channels = [np.interp(places, np.arange(len(_COLOURS)), channel) for channel in np.array(_COLOURS).T]
    return np.stack(channels, 1).round().astype(np.uint8)


def _png(shades: np.ndarray, palette: np.ndarray) -> bytes:
    """(height, width) uint8 places in a (num_colours, 3) palette -> a PNG file."""
    height, width = shades.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), shades], 1)  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, of a palette
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def interval_plot(
    names: Sequence[str], means: Sequence[float], intervals: Sequence[tuple[float, float] | None],
    is_base: Sequence[bool], title: str,
) -> bytes:  # fmt: skip
    """A PNG with a point and a bar for each line, the first on top; the base's points go over the whole height."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 1.1 + 0.34 * len(names)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for place, (mean, bounds, of_base) in enumerate(zip(means, intervals, is_base, strict=True)):
        colour = "#a8501b" if of_base else "#2f5fa8"
        low, high = bounds or (mean, mean)
        axes.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
        axes.plot([mean], [place], "D" if of_base else "o", color=colour, markersize=6)
        if of_base:
            axes.axvline(mean, color=colour, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
