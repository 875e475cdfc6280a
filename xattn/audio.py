"""Any recording as mono float32 samples at 16 kHz, and its Kaldi log-Mel filterbank features."""

import io
from contextlib import suppress
from math import gcd
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO

import av
import kaldi_native_fbank as knf
import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly

SAMPLE_RATE = 16_000  # Hz
WINDOW_SECONDS = 0.025  # length of the analysis window
FRAME_SECONDS = 0.010  # hop from one frame to the next
WINDOW_SAMPLES = SAMPLE_RATE * 25 // 1000  # 400 samples
FRAME_SAMPLES = SAMPLE_RATE * 10 // 1000  # 160 samples
N_MELS = 80  # bands of the filterbank
MEL_LOW = 20.0  # Hz, lower edge of the first band; the upper edge of the last one is the Nyquist frequency
# A compressed recording ends at the end of a packet; up to this much may be missing without being an error.
MISSING_SECONDS, MISSING_SHARE = 0.5, 0.02
INT16_SCALE = 2**15  # Kaldi's filterbank expects samples in the range of 16-bit integers

Recording = str | PathLike | BinaryIO | bytes | np.ndarray | torch.Tensor | tuple | dict


def load_audio(audio: Recording, rate: int | None = None) -> np.ndarray:
    """Return a recording as mono samples at 16 kHz.

    Channels are averaged, integers are divided by their full scale, and other rates are converted with a polyphase
    filter. WAV, FLAC and Ogg files are read by soundfile; MP3, M4A, MP4 and WebM by FFmpeg.

    Args:
        audio: the path of an audio or video file, an open binary file or its bytes, samples (array or tensor) with
            `rate`, `(rate, samples)`, or `{"array": samples, "sampling_rate": rate}`. Samples have shape (samples,) or,
            with several channels, (samples, channels) or (channels, samples): the shorter axis is the channels.
        rate: the rate of the samples in Hz; files know their own.

    Returns:
        float32 samples, nominally in [-1, 1], shape (samples,).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unreadable or incomplete, the rate is missing or superfluous, or the audio is empty, not
            finite, silent or shorter than one window.
        TypeError: `audio` is none of the above.
    """
    name = "The audio given"
    match audio:
        case {"array": array, "sampling_rate": file_rate}:
            samples = _from_array(array)
        case (int() | np.integer() as file_rate, np.ndarray() | torch.Tensor() as array):
            samples = _from_array(array)
        case np.ndarray() | torch.Tensor():
            samples, file_rate = _from_array(audio), rate
            if rate is None:
                raise ValueError("The rate of the samples is not given: add it in Hz, such as rate=16000.")
        case str() | PathLike():
            name = fspath(audio)
            if not Path(name).is_file():
                raise FileNotFoundError(f"There is no audio file {name}: check the path.")
            samples, file_rate = _from_file(name, name)
        case _ if isinstance(audio, bytes) or hasattr(audio, "read"):
            content = audio if isinstance(audio, bytes) else audio.read()
            samples, file_rate = _from_file(io.BytesIO(content), name)
        case _:
            raise TypeError(
                f"A {type(audio).__name__} is not a recording: give a path, an open file, samples with rate=, "
                "(rate, samples) or {'array': samples, 'sampling_rate': rate}."
            )
    if rate not in (None, file_rate):
        raise ValueError(f"{name} is at {file_rate} Hz, not {rate} Hz: leave out rate.")
    if not (isinstance(file_rate, Real) and file_rate >= 1 and file_rate % 1 == 0):
        raise ValueError(f"The rate of the samples is {file_rate}: give a whole number of Hz.")
    mono, file_rate = samples.mean(axis=1, dtype=np.float32), int(file_rate)
    _check(mono, file_rate, name)
    if file_rate == SAMPLE_RATE:
        return mono
    divisor = gcd(file_rate, SAMPLE_RATE)
    return resample_poly(mono, SAMPLE_RATE // divisor, file_rate // divisor)


def seconds_of(path: str | PathLike) -> float:
    """Length of a recording in seconds as its header states it, without decoding; some MP3 files state it roughly.

    FileNotFoundError, ValueError: see `load_audio`.
    """
    with suppress(soundfile.LibsndfileError, OSError):
        header = soundfile.info(fspath(path))
        if header.format != "MP3":
            return header.duration
    with suppress(av.error.FFmpegError, OSError), av.open(fspath(path)) as container:
        if container.duration:
            return container.duration / av.time_base
    return load_audio(path).size / SAMPLE_RATE


def log_mel(audio: np.ndarray, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Log-Mel filterbank energies as Kaldi computes them (paper, section 4: 80 bands, 25 ms window, 10 ms hop).

    Povey window, pre-emphasis 0.97, no dither; only frames that lie completely inside the audio.

    Args:
        audio: mono samples, shape (samples,).
        rate: their rate in Hz.

    Returns:
        float32 natural logarithms of the energies on Kaldi's 16-bit scale, shape (time, 80).

    Raises:
        ValueError: the audio is not one channel of floats, or is empty, not finite, silent or shorter than one window.
    """
    audio = checked(audio, rate)
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.frame_length_ms = 1000 * WINDOW_SECONDS
    options.frame_opts.frame_shift_ms = 1000 * FRAME_SECONDS
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = N_MELS
    options.mel_opts.low_freq = MEL_LOW
    options.use_energy = False
    filterbank = knf.OnlineFbank(options)
    filterbank.accept_waveform(rate, (INT16_SCALE * audio).tolist())
    filterbank.input_finished()
    return np.stack([filterbank.get_frame(i) for i in range(filterbank.num_frames_ready)])


def checked(audio: np.ndarray, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return mono float samples (samples,) unchanged. ValueError: see `log_mel`."""
    audio = np.asarray(audio)
    if audio.ndim != 1 or audio.dtype.kind != "f":
        raise ValueError(
            f"The audio given has shape {audio.shape} and type {audio.dtype}, but one channel of floats in [-1, 1] is "
            "needed: pass it through xattn.audio.load_audio."
        )
    _check(audio, rate, "The audio given")
    return audio


def mel_centres(rate: int = SAMPLE_RATE, bands: int = N_MELS) -> np.ndarray:
    """Centre frequency of each band of `log_mel` in Hz, shape (bands,): equidistant on Kaldi's Mel scale."""
    edges = np.linspace(_hz_to_mel(MEL_LOW), _hz_to_mel(rate / 2), bands + 2)
    return 700.0 * np.expm1(edges[1:-1] / 1127.0)


def cmvn(features: np.ndarray) -> np.ndarray:
    """Normalise each band to mean 0 and variance 1 over the utterance.

    Args:
        features: shape (time, mel).

    Returns:
        float32 of the same shape (population standard deviation); a band that never changes becomes 0.
    """
    features = features.astype(np.float64)
    # Compare exactly: otherwise the rounding noise of a constant band's mean would be scaled up to +-1.
    constant = features.max(axis=0) == features.min(axis=0)
    scale = np.where(constant, 1.0, features.std(axis=0))
    return ((features - features.mean(axis=0)) / scale).astype(np.float32)


def _hz_to_mel(frequency: float) -> float:
    return 1127.0 * np.log1p(frequency / 700.0)


def _from_array(samples: np.ndarray | torch.Tensor) -> np.ndarray:
    """Samples of any type and shape as floats (samples, channels)."""
    samples = samples.detach().cpu().numpy() if isinstance(samples, torch.Tensor) else np.asarray(samples)
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "iuf":
        raise ValueError(
            f"The audio given has shape {samples.shape} and type {samples.dtype}: give real samples with one axis, or "
            "two for several channels."
        )
    if samples.dtype.kind in "iu":
        middle = 2 ** (8 * samples.dtype.itemsize - 1)
        offset = middle if samples.dtype.kind == "u" else 0  # unsigned samples are silent at half their range
        samples = (samples.astype(np.float64) - offset) / middle
    if samples.ndim == 1 or not samples.size:
        return samples.reshape(-1, 1)
    return samples if samples.shape[0] >= samples.shape[1] else samples.T


def _from_file(file: str | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    """Samples as float32 (samples, channels) and their rate in Hz."""
    try:
        return _read(file, name)
    except (soundfile.LibsndfileError, av.error.FFmpegError) as error:
        raise ValueError(
            f"{name} cannot be read as audio: convert it to WAV or FLAC, or replace it if it is damaged."
        ) from error


def _read(file: str | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    try:
        recording = soundfile.SoundFile(file)
    except soundfile.LibsndfileError:
        return _read_ffmpeg(file, name)
    with recording:
        # libsndfile guesses the length of an MP3 with a variable bit rate and may cut off its end.
        if recording.format == "MP3":
            return _read_ffmpeg(file, name)
        samples = recording.read(dtype="float32", always_2d=True)
        if len(samples) < recording.frames:
            raise ValueError(
                f"{name} ends after {len(samples)} of the {recording.frames} samples it announces: "
                "replace it by a complete copy."
            )
        return samples, recording.samplerate


def _read_ffmpeg(file: str | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with av.open(file) as container:
        if not container.streams.audio:
            raise ValueError(f"{name} holds no audio track: choose a file with sound.")
        stream, announced = container.streams.audio[0], _announced_seconds(container)
        planar, frames, end = av.AudioResampler(format="fltp"), [], 0.0
        for packet in container.demux():  # of all streams, because a film may go on without sound
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                frames += [frame.to_ndarray() for decoded in packet.decode() for frame in planar.resample(decoded)]
        seconds = end - (container.start_time or 0) / av.time_base
        if seconds < announced - max(MISSING_SECONDS, MISSING_SHARE * announced):
            raise ValueError(
                f"{name} ends after {seconds:.1f} of the {announced:.1f} s it announces: replace it by a complete copy."
            )
        nothing = np.zeros((stream.codec_context.channels, 0), np.float32)
        return np.concatenate([nothing, *frames], axis=1).T, stream.codec_context.sample_rate


def _announced_seconds(container: av.container.InputContainer) -> float:
    """Duration that the container states; 0 if it states none and FFmpeg guesses from the size and first bit rate."""
    announced = (container.duration or 0) / av.time_base
    streams = (*container.streams.audio, *container.streams.video)
    rate = sum(getattr(stream.codec_context, "bit_rate", None) or 0 for stream in streams)  # None: unknown codec
    guessed = rate and 8 * container.size / rate >= (1 - MISSING_SHARE) * announced
    return 0.0 if guessed else announced


def _check(audio: np.ndarray, rate: int, name: str) -> None:
    if audio.size == 0:
        raise ValueError(f"{name} holds no samples: record or export it again.")
    if not np.isfinite(audio).all():
        raise ValueError(f"{name} holds samples that are not finite (NaN or infinity): record or export it again.")
    if audio.min() == audio.max():
        raise ValueError(f"{name} is silent (every sample is {audio[0]:g}): record it again or choose another channel.")
    window = round(rate * WINDOW_SECONDS)
    if audio.size < window:
        raise ValueError(
            f"{name} lasts {1000 * audio.size / rate:.1f} ms, less than one window of "
            f"{1000 * WINDOW_SECONDS:.0f} ms: use a longer recording."
        )
