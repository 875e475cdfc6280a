"""Any recording as mono float32 samples at 16 kHz, and its Kaldi log-Mel filterbank features."""

import io
import os
import stat
from contextlib import nullcontext, suppress
from math import ceil, gcd, log10
from numbers import Integral, Real
from os import PathLike, fsdecode
from typing import BinaryIO

import av
import kaldi_native_fbank as knf
import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly

from xattn.containers import DAY, check_extent, extent_of, is_complete, is_placeholder, restated

SAMPLE_RATE = 16_000  # Hz
WINDOW_SECONDS = 0.025  # length of the analysis window
FRAME_SECONDS = 0.010  # hop from one frame to the next
WINDOW_SAMPLES = SAMPLE_RATE * 25 // 1000  # 400 samples
FRAME_SAMPLES = SAMPLE_RATE * 10 // 1000  # 160 samples
N_MELS = 80  # bands of the filterbank
MEL_LOW = 20.0  # Hz, lower edge of the first band; the upper edge of the last one is the Nyquist frequency
# Some compressed containers state their length roughly: up to this much may be missing without being an error.
MISSING_SECONDS = 0.5
GUESS_SHARE = 0.02  # a length within this share of size over bit rate is one that FFmpeg has guessed
CANCELLED = 0.1  # a mix weaker than this share of its channels (-20 dB) is what they do not have in common
BLOCK = 2**20  # samples to read at once
INT16_SCALE = 2**15  # Kaldi's filterbank expects samples in the range of 16-bit integers

NOT_SOUNDFILE = (soundfile.LibsndfileError, TypeError)  # TypeError: the name ends in .raw, but no rate is given

Recording = str | PathLike | BinaryIO | bytes | np.ndarray | torch.Tensor | tuple | dict


def load_audio(audio: Recording, rate: int | None = None, channel: int | None = None) -> np.ndarray:
    """Return a recording as mono samples at 16 kHz.

    Channels are averaged unless one is chosen, integers are divided by their full scale, and other rates are converted
    with a polyphase filter. soundfile reads WAV, FLAC, Ogg and other files; FFmpeg reads MP3 and whatever soundfile
    cannot read.

    A recording that holds less than its container states is refused. If the container states no length, or a
    placeholder (see `is_placeholder`), the recording is read to its end. An Ogg stream states no length; if it lacks
    its last page, as those of some telephones do, that is printed.

    Args:
        audio: the path of an audio or video file (see also `beside_notebook`), an open binary file or its bytes,
            samples (array or tensor) with `rate`, `(rate, samples)`, or `{"array": samples, "sampling_rate": rate}`.
            Samples have shape (samples,) or, with several channels, (samples, channels) or (channels, samples): the
            shorter axis is the channels.
        rate: the rate of the samples in Hz; files know their own.
        channel: the channel to use, counted from 0, instead of the average of all.

    Returns:
        float32 samples, nominally in [-1, 1], shape (samples,).

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, OSError: the path is not a file that can be opened.
        ValueError: the file is unreadable or incomplete, the rate is missing or superfluous, there is no such channel,
            the channels cancel each other in their average, or the audio is empty, not finite, shorter than two frames
            (35 ms) or silent.
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
            name = beside_notebook(audio)
            check_file(name)
            samples, file_rate = _from_file(name, name)
        case io.TextIOBase():
            raise TypeError("The file given is open as text: open it with mode 'rb'.")
        case _ if isinstance(audio, bytes) or hasattr(audio, "read"):
            content = audio if isinstance(audio, bytes) else audio.read()
            if not content:
                raise ValueError(f"{name} has no bytes to read: rewind it if it is an open file, or record it again.")
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
    mono, file_rate = _mono(samples, channel, name), int(file_rate)
    _check(mono, file_rate, name, frames=2)  # `cmvn` sets a single frame to 0
    if file_rate == SAMPLE_RATE:
        return mono
    divisor = gcd(file_rate, SAMPLE_RATE)
    return resample_poly(mono, SAMPLE_RATE // divisor, file_rate // divisor)


def beside_notebook(path: str | PathLike) -> str:
    """Return a path, or the file beside the open Jupyter notebook that has this name, if only that one exists.

    JupyterLab uploads files there, which need not be the folder in which the kernel runs.
    """
    path, notebook = fsdecode(path), os.environ.get("JPY_SESSION_NAME", "")
    beside = os.path.join(os.path.dirname(notebook), path)
    if not os.path.isabs(notebook) or os.path.exists(path) or not os.path.isfile(beside):
        return path
    print(f"{path} is read from the folder of this notebook.", flush=True)
    return beside


def seconds_of(path: str | PathLike) -> float:
    """Length of a recording in seconds as its header states it; some MP3 files state it roughly.

    The recording is decoded only if its header states no length, or a wrong one.

    OSError, ValueError: see `load_audio`.
    """
    path = fsdecode(path)
    check_file(path)
    if is_complete(path):
        with suppress(*NOT_SOUNDFILE):
            header = soundfile.info(path)
            if "MPEG" not in header.subtype and header.frames and not is_placeholder(header.frames, header.duration):
                return header.duration
        with suppress(av.error.FFmpegError), _opened_by_ffmpeg(path) as container:
            if container.duration and container.duration / av.time_base <= DAY:
                return container.duration / av.time_base
    return load_audio(path).size / SAMPLE_RATE


def check_file(path: str | PathLike) -> None:
    """Check that a path is a file with content that can be opened.

    FileNotFoundError, IsADirectoryError, PermissionError, OSError, or ValueError if the file is empty.
    """
    path = fsdecode(path)
    if path != path.encode(errors="replace").decode():
        raise ValueError(f"The file name {path!a} is not valid text: rename the file.")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                empty = not file.read(1)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the path holds a null character
        raise FileNotFoundError(f"There is no audio file {path}: check the path.") from None
    except PermissionError as error:
        raise PermissionError(
            f"The permission to read {path} is denied: change the permissions of the file or of its folder."
        ) from error
    except OSError as error:
        raise OSError(f"{path} cannot be opened ({error.strerror}): check the path and the disk.") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder: give the path of an audio file.")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is a pipe or a device: pass it as an open file, or save the recording in a file first.")
    if empty:
        raise ValueError(f"{path} is empty (0 bytes): record or export it again.")


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
    _check(audio, rate, "The audio given", frames=1)
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


def _mono(samples: np.ndarray, channel: int | None, name: str) -> np.ndarray:
    """Average the channels of floats (samples, channels), or choose one: float32 (samples,).

    ValueError: there is no such channel, or the channels cancel each other.
    """
    channels = samples.shape[1]
    if channel is not None:
        if not isinstance(channel, Integral) or isinstance(channel, bool) or not 0 <= channel < channels:
            advice = f"choose one from 0 to {channels - 1}" if channels > 1 else "choose channel 0, its only one"
            raise ValueError(f"{name} has no channel {channel!r}: {advice}.")
        return samples[:, channel].astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        mono = samples.mean(axis=1, dtype=np.float32)
    if channels > 1 and mono.size:
        _check_finite(mono, name)
        _check_mix(samples, mono, name)
    return mono


def _check_mix(samples: np.ndarray, mono: np.ndarray, name: str) -> None:
    """ValueError: the channels (samples, channels) cancel each other in their average."""
    # Standard deviations, because a constant offset is not audible.
    mixed = mono.std(dtype=np.float64) if np.ptp(mono) else 0.0
    flat = samples.ravel(order="K").astype(np.promote_types(samples.dtype, np.float32), copy=False)
    if mixed > 2 * CANCELLED * np.sqrt(flat @ flat / flat.size):  # a bound, many times faster than the level itself
        return
    varying = [channel.var(dtype=np.float64) for channel in samples.T if np.ptp(channel)]
    level = np.sqrt(sum(varying) / samples.shape[1])
    if mixed < CANCELLED * level:
        mix = f"{20 * log10(level / mixed):.0f} dB weaker than they are" if mixed else "silent"
        raise ValueError(
            f"{name} has {samples.shape[1]} channels that cancel each other (their average is {mix}): choose one, such "
            "as channel=0."
        )


def _check(audio: np.ndarray, rate: int, name: str, frames: int) -> None:
    if audio.size == 0:
        raise ValueError(f"{name} holds no samples: record or export it again.")
    _check_finite(audio, name)
    least = WINDOW_SAMPLES + (frames - 1) * FRAME_SAMPLES  # at 16 kHz
    if audio.size < ceil(rate * least / SAMPLE_RATE):
        needed = "one window of 25 ms" if frames == 1 else "the 35 ms of two frames"
        raise ValueError(f"{name} lasts {1000 * audio.size / rate:.1f} ms, less than {needed}: use a longer recording.")
    if audio.min() == audio.max():
        raise ValueError(f"{name} is silent (every sample is {audio[0]:g}): record it again or choose another channel.")


def _check_finite(samples: np.ndarray, name: str) -> None:
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} holds samples that are not finite (NaN or infinity): record or export it again.")


def _from_file(file: str | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    """Samples as float32 (samples, channels) and their rate in Hz."""
    with open(file, "rb") if isinstance(file, str) else nullcontext(file) as stream:
        extent = extent_of(stream)
        if extent.start >= extent.size:
            check_extent(extent, 0.0, name)
        elif extent.field and not extent.is_complete:
            file = restated(stream, extent)
    try:
        samples, rate = _read(file, name)
    except av.error.FFmpegError as error:
        check_extent(extent, 0.0, name)
        raise _unreadable(name) from error
    except ValueError:
        check_extent(extent, 0.0, name)
        raise
    check_extent(extent, len(samples) / rate, name)
    if not extent.is_closed:
        print(f"{name} lacks the page that ends an Ogg stream: if the recording is incomplete, replace it.", flush=True)
    return samples, rate


def _read(file: str | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    """Read with soundfile or, if it fails, with FFmpeg; see `_from_file`."""
    if isinstance(file, io.BytesIO):
        file.seek(0)
    frames = format = None
    with suppress(*NOT_SOUNDFILE), soundfile.SoundFile(file) as recording:
        # libsndfile guesses the length of an MP3 with a variable bit rate and may cut off its end.
        if "MPEG" not in recording.subtype:
            frames, rate, format = recording.frames, recording.samplerate, recording.format
            samples = _read_blocks(recording)
            if len(samples) < frames and not is_placeholder(frames, frames / rate):
                raise _unreadable_end(name, len(samples), frames, "samples")
            return samples, rate
    try:
        return _read_ffmpeg(file, name)
    except av.error.FFmpegError as error:
        if format == "FLAC" and not is_placeholder(frames, frames / rate):  # it was cut off in its first frame
            raise _unreadable_end(name, 0, frames, "samples") from error
        raise


def _read_blocks(recording: soundfile.SoundFile) -> np.ndarray:
    """Read to the end in blocks, because a header can state any number of samples, or none."""
    blocks = [np.zeros((0, recording.channels), np.float32)]
    while len(block := recording.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block)
    return np.concatenate(blocks)


def _read_ffmpeg(file: str | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    with _opened_by_ffmpeg(file) as container:
        if not container.streams.audio:
            raise ValueError(f"{name} holds no audio track: choose a file with sound.")
        stream = container.streams.audio[0]
        if stream.codec_context is None:  # FFmpeg does not know the codec
            raise _unreadable(name)
        announced = _announced_seconds(container)
        samples, ends, broken = _decoded(container, stream, name)
        rate = stream.codec_context.sample_rate
        if not rate:  # nothing could be decoded
            raise _unreadable(name)
        if container.format.name == "flac":  # FFmpeg skips damaged frames, but the timestamps of others count them
            frames = round(rate * (announced or ends.get(stream.index, 0.0)))
            if len(samples) < frames:
                raise _unreadable_end(name, len(samples), frames, "samples")
            if broken:
                raise _unreadable(name)
        seconds = max(ends.values(), default=0.0) - (container.start_time or 0) / av.time_base
        if announced and (broken or seconds < announced - MISSING_SECONDS):
            raise _unreadable_end(name, f"{min(seconds, len(samples) / rate):.2f}", f"{announced:.2f}", "s")
        return samples, rate


def _decoded(
    container: av.container.InputContainer, stream: av.AudioStream, name: str
) -> tuple[np.ndarray, dict[int, float], bool]:
    """Samples (samples, channels) of a stream, the end of each stream in seconds, whether the last packet is broken.

    ValueError: an earlier packet is broken.
    """
    is_flac = container.format.name == "flac"
    if is_flac:
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    planar, frames, ends, broken = av.AudioResampler(format="fltp"), [], {}, False
    for packet in container.demux():  # of all streams, because a film may go on without sound
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[packet.stream.index] = max(end, ends.get(packet.stream.index, 0.0))
        if packet.stream.index != stream.index:
            continue
        if broken and packet.size:  # damage, rather than the end of a file that was cut off
            raise _unreadable(name)
        try:
            frames += [frame.to_ndarray() for decoded in packet.decode() for frame in planar.resample(decoded)]
        except (av.error.FFmpegError, ValueError):  # ValueError: the channels change
            broken = True
        if is_flac and packet.size and packet.pts is None:  # it holds two frames, because a header is damaged
            broken = True
    nothing = np.zeros((stream.codec_context.channels, 0), np.float32)
    return np.concatenate([nothing, *frames], axis=1).T, ends, broken


def _opened_by_ffmpeg(file: str | io.BytesIO) -> av.container.InputContainer:
    if isinstance(file, io.BytesIO):
        file.seek(0)
    else:
        file = f"file:{file}"  # or a colon in the name would end a protocol
    return av.open(file, metadata_errors="replace")  # titles may be in any encoding


def _announced_seconds(container: av.container.InputContainer) -> float:
    """Duration that the container states; 0 if it states none, and FFmpeg guesses from the size and first bit rate."""
    announced = (container.duration or 0) / av.time_base
    streams = (*container.streams.audio, *container.streams.video)
    rate = sum(getattr(stream.codec_context, "bit_rate", None) or 0 for stream in streams)  # None: unknown codec
    guessed = rate and 8 * container.size / rate >= (1 - GUESS_SHARE) * announced
    samples = announced * (container.streams.audio[0].codec_context.sample_rate or 0)
    return 0.0 if guessed or is_placeholder(samples, announced) else announced


def _unreadable(name: str) -> ValueError:
    return ValueError(f"{name} cannot be read as audio: convert it to WAV or FLAC, or replace it if it is damaged.")


def _unreadable_end(name: str, found: int | str, announced: int | str, unit: str) -> ValueError:
    return ValueError(
        f"{name} can be read for only {found} of the {announced} {unit} it announces: replace it with a complete copy."
    )
