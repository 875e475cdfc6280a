"""Any recording as mono float32 at the model's rate, and its Kaldi log-Mel filterbank features."""

from math import gcd
from pathlib import Path

import av
import kaldi_native_fbank as knf
import numpy as np
import soundfile
from scipy.signal import resample_poly

SAMPLE_RATE = 16_000  # Hz
WINDOW_SECONDS = 0.025  # length of the analysis window
FRAME_SECONDS = 0.010  # hop from one frame to the next
WINDOW_SAMPLES = SAMPLE_RATE * 25 // 1000  # 400 samples
FRAME_SAMPLES = SAMPLE_RATE * 10 // 1000  # 160 samples
N_MELS = 80  # bands of the filterbank
MEL_LOW = 20.0  # Hz, lower edge of the first band; the upper edge of the last one is the Nyquist frequency
# Of a compressed recording, whose frames end where they must, this much may be missing.
MISSING_SECONDS, MISSING_SHARE = 0.5, 0.02
INT16_SCALE = 2**15  # Kaldi's filterbank expects samples in the range of 16-bit integers


def load_audio(path: str | Path, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Read a recording of any common format, channel count and rate.

    Channels are averaged and the result is resampled with a polyphase filter. WAV, FLAC and Ogg are read by
    soundfile; MP3, M4A, MP4 and WebM by FFmpeg.

    Args:
        path: the audio or video file.
        rate: the rate to return, in Hz.

    Returns:
        float32 samples in [-1, 1] nominally, shape (samples,).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unreadable or incomplete, or its audio is empty, not finite, silent or shorter than
            one window.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no audio file {path}: check the path.")
    try:
        samples, file_rate = _read(path)
    except (soundfile.LibsndfileError, av.error.FFmpegError) as error:
        raise ValueError(
            f"{path} cannot be read as audio: convert it to WAV or FLAC, or replace it if it is damaged."
        ) from error
    audio = samples.mean(axis=1, dtype=np.float32)
    _check(audio, file_rate, str(path))
    if file_rate == rate:
        return audio
    divisor = gcd(file_rate, rate)
    return resample_poly(audio, rate // divisor, file_rate // divisor)


def log_mel(audio: np.ndarray, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Log-Mel filterbank energies as Kaldi computes them (the paper's front end: 80 bands, 25 ms window, 10 ms hop).

    Povey window, pre-emphasis 0.97, no dither; only frames that lie wholly inside the audio.

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
    """Mono samples (samples,) as an array. ValueError: as `log_mel`."""
    audio = np.asarray(audio)
    if audio.ndim != 1 or audio.dtype.kind != "f":
        raise ValueError(
            f"The audio given has shape {audio.shape} and type {audio.dtype} where one channel of floats in [-1, 1] is "
            "needed: average the channels and divide integers by their full scale."
        )
    _check(audio, rate, "The audio given")
    return audio


def mel_centres(rate: int = SAMPLE_RATE, bands: int = N_MELS) -> np.ndarray:
    """Centre frequency of each band of `log_mel` in Hz, shape (bands,): equidistant on Kaldi's Mel scale."""
    edges = np.linspace(_hz_to_mel(MEL_LOW), _hz_to_mel(rate / 2), bands + 2)
    return 700.0 * np.expm1(edges[1:-1] / 1127.0)


def cmvn(features: np.ndarray) -> np.ndarray:
    """Utterance-level mean and variance normalisation of each band over time.

    Args:
        features: shape (time, mel).

    Returns:
        float32 of the same shape, each band with mean 0 and (population) standard deviation 1; a band that never
        changes becomes 0.
    """
    features = features.astype(np.float64)
    # Compared exactly, as the rounding noise of a constant band's mean would otherwise be scaled up to +-1.
    constant = features.max(axis=0) == features.min(axis=0)
    scale = np.where(constant, 1.0, features.std(axis=0))
    return ((features - features.mean(axis=0)) / scale).astype(np.float32)


def _hz_to_mel(frequency: float) -> float:
    return 1127.0 * np.log1p(frequency / 700.0)


def _read(path: Path) -> tuple[np.ndarray, int]:
    """Samples as float32 (samples, channels) and their rate in Hz."""
    try:
        recording = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        return _read_ffmpeg(path)
    with recording:
        # An MP3 of variable bit rate need not state its length: libsndfile then guesses it and cuts off the rest.
        if recording.format == "MP3":
            return _read_ffmpeg(path)
        samples = recording.read(dtype="float32", always_2d=True)
        if len(samples) < recording.frames:
            raise ValueError(
                f"{path} ends after {len(samples)} of the {recording.frames} samples it announces: "
                "replace it by a complete copy."
            )
        return samples, recording.samplerate


def _read_ffmpeg(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError(f"{path} holds no audio track: choose a file with sound.")
        stream, announced = container.streams.audio[0], _announced_seconds(container)
        planar, frames, end = av.AudioResampler(format="fltp"), [], 0.0
        for packet in container.demux():  # of all streams, as a film may go on without sound
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                frames += [frame.to_ndarray() for decoded in packet.decode() for frame in planar.resample(decoded)]
        seconds = end - (container.start_time or 0) / av.time_base
        if seconds < announced - max(MISSING_SECONDS, MISSING_SHARE * announced):
            raise ValueError(
                f"{path} ends after {seconds:.1f} of the {announced:.1f} s it announces: replace it by a complete copy."
            )
        nothing = np.zeros((stream.codec_context.channels, 0), np.float32)
        return np.concatenate([nothing, *frames], axis=1).T, stream.codec_context.sample_rate


def _announced_seconds(container: av.container.InputContainer) -> float:
    """How long a recording says it lasts; 0 where it does not, and FFmpeg guesses from its size and first bit rate."""
    announced = (container.duration or 0) / av.time_base
    streams = (*container.streams.audio, *container.streams.video)
    rate = sum(getattr(stream.codec_context, "bit_rate", None) or 0 for stream in streams)  # None of an unknown codec
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
