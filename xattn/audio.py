"""Any recording as mono float32 samples at 16 kHz, and its Kaldi log-Mel filterbank features."""

import io
import os
import re
import stat
import struct
from contextlib import nullcontext, suppress
from math import ceil, gcd, log10, prod
from numbers import Integral, Real
from os import PathLike, fsdecode
from typing import BinaryIO, NamedTuple

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
# Some compressed containers state their length roughly: up to this much may be missing without being an error.
MISSING_SECONDS = 0.5
GUESS_SHARE = 0.02  # a length within this share of size over bit rate is one that FFmpeg has guessed
DAY = 86_400.0  # seconds
PLACEHOLDERS, PLACEHOLDER_RANGE = (2**31, 2**32), 2**24  # see `is_placeholder`
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
        audio: the path of an audio or video file, an open binary file or its bytes, samples (array or tensor) with
            `rate`, `(rate, samples)`, or `{"array": samples, "sampling_rate": rate}`. Samples have shape (samples,) or,
            with several channels, (samples, channels) or (channels, samples): the shorter axis is the channels.
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
            name = fsdecode(audio)
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


def seconds_of(path: str | PathLike) -> float:
    """Length of a recording in seconds as its header states it; some MP3 files state it roughly.

    The recording is decoded only if its header states no length, or a wrong one.

    OSError, ValueError: see `load_audio`.
    """
    path = fsdecode(path)
    check_file(path)
    if _is_complete(path):
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


def is_placeholder(count: float, seconds: float) -> bool:
    """Whether a stated length cannot be true, so that it counts as unknown.

    A program that writes to a pipe does not know the length in advance. It writes 0 or about the largest number that
    fits: FFmpeg 0xFFFFFFFF, SoX 0x7FFFF000 in WAV and 0x7F000000 in AIFF, others 0x7FFFFFFF. A program that is killed
    leaves such numbers too. Therefore a length that the file does not hold counts as unknown if it is within 2^24 of
    2^31 or 2^32, or if it exceeds a day. A length of 0 counts as unknown if audio follows. Every other length is
    believed: a file that holds less is incomplete.

    Args:
        count: the length in the container's own unit, bytes or samples.
        seconds: the same length in seconds.
    """
    return seconds > DAY or any(abs(count - number) <= PLACEHOLDER_RANGE for number in PLACEHOLDERS)


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
        extent = _extent(stream)
        if extent.start >= extent.size:
            _check_extent(extent, 0.0, name)
        elif extent.field and not extent.is_complete:
            file = _restated(stream, extent)
    try:
        samples, rate = _read(file, name)
    except av.error.FFmpegError as error:
        _check_extent(extent, 0.0, name)
        raise _unreadable(name) from error
    except ValueError:
        _check_extent(extent, 0.0, name)
        raise
    _check_extent(extent, len(samples) / rate, name)
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


class Extent(NamedTuple):
    """Where a container says that its audio is, in bytes from the start of the file.

    size: of the file.
    stated: the length in the header, which stands at the position and in the format (of `struct`) given by `field`.
    is_closed: False if an Ogg stream has no page that ends it.
    """

    start: int
    end: int
    size: int
    stated: int
    field: tuple[int, str] | None = None
    is_closed: bool = True

    @property
    def is_complete(self) -> bool:
        return self.start < self.end <= self.size


def _check_extent(extent: Extent, seconds: float, name: str) -> None:
    """ValueError: the file, of which so many seconds could be read, ends before its audio does."""
    if extent.end <= extent.size:
        return
    share = (extent.end - extent.start) / max(extent.size - extent.start, 1)
    if not is_placeholder(extent.stated, share * seconds):
        raise ValueError(
            f"{name} ends after {extent.size} of the {extent.end} bytes it announces: replace it with a complete copy."
        )


def _restated(file: BinaryIO, extent: Extent) -> io.BytesIO:
    """Copy a file and set the length in its header to what it holds, because decoders trust even absurd lengths."""
    file.seek(0)
    content, (position, kind) = bytearray(file.read()), extent.field
    length = extent.stated + extent.size - extent.end
    struct.pack_into(kind, content, position, min(length, 2 ** (8 * struct.calcsize(kind)) - 1))
    return io.BytesIO(content)


def _is_complete(path: str) -> bool:
    with open(path, "rb") as file:
        return _extent(file).is_complete


def _extent(file: BinaryIO) -> Extent:
    """What the container states about its audio in bytes; the whole file if it states nothing."""
    size = file.seek(0, os.SEEK_END)
    whole = Extent(0, size, size, size)
    file.seek(0)
    head = file.read(12).ljust(12, b"\0")
    if head[:4] in LAYOUTS:
        return _chunk_extent(file, size, LAYOUTS[head[:4]]) or whole
    if head[:4] in (b".snd", b"dns.") and size >= 24:  # AU
        order = ">" if head[:4] == b".snd" else "<"
        start, stated = struct.unpack(f"{order}II", head[4:])
        return Extent(start, start + stated, size, stated, (8, f"{order}I"))
    if head[:7] == b"NIST_1A":
        return _sphere_extent(file, size) or whole
    if head[:4] == b"OggS":
        return _ogg_extent(file, size)
    end = 0
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):  # MP4, M4A, MOV
        end = _boxes_end(file, size)
    elif head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, WebM
        end = _segment_end(file)
    elif head[:3] == b"ID3" or (head[0] == 0xFF and head[1] >= 0xE0):
        end = _mp3_end(file)
    return Extent(0, end, size, end) if end else whole


class Layout(NamedTuple):
    """How a container arranges its chunks.

    first: position of the first chunk.
    header: of a chunk, in the format of `struct`: its name and its size.
    counted: bytes of the header that the size includes.
    align: chunks start at multiples of this.
    """

    first: int
    header: str
    counted: int
    align: int


_LITTLE, _BIG = Layout(12, "<4sI", 0, 2), Layout(12, ">4sI", 0, 2)
LAYOUTS = {
    b"RIFF": _LITTLE,  # WAV
    b"RF64": _LITTLE,
    b"BW64": _LITTLE,
    b"RIFX": _BIG,
    b"FORM": _BIG,  # AIFF
    b"caff": Layout(8, ">4sQ", 0, 1),  # CAF
    b"riff": Layout(40, "<16sQ", 24, 8),  # W64
}
# Chunks that hold the audio, and how many bytes come before it in them.
AUDIO_CHUNKS = {b"data": 0, b"SSND": 8, b"BODY": 0}


def _chunk(file: BinaryIO, size: int, layout: Layout, at: int) -> tuple[bytes, int, int] | None:
    """Name (4 bytes), stated size and end of the chunk at a position; None if there is none."""
    length = struct.calcsize(layout.header)
    if at + length > size:
        return None
    file.seek(at)
    name, stated = struct.unpack(layout.header, file.read(length))
    printable = all(32 <= byte < 127 for byte in name[:4])
    return (name[:4], stated, at + length + stated - layout.counted) if printable else None


def _chunk_extent(file: BinaryIO, size: int, layout: Layout) -> Extent | None:
    """See `_extent`, for a container of chunks; None if it has no audio, or empty audio."""
    at, end, name, wide, length = layout.first, layout.first, b"", None, struct.calcsize(layout.header)
    while chunk := _chunk(file, size, layout, at):
        name, stated, end = chunk
        body = at + length
        if name in AUDIO_CHUNKS:
            break
        if name == b"ds64":  # of RF64, whose audio may exceed the 32 bits of its size
            wide = body + 8
        at = -(-max(end, body) // layout.align) * layout.align
    else:  # a list may hold the audio of an AVI film; other names may be bytes that were taken for a chunk
        return Extent(0, end, size, end) if name == b"LIST" else None
    start = body + (4 if layout is LAYOUTS[b"caff"] else AUDIO_CHUNKS[name])
    field = (at + length - struct.calcsize(layout.header[-1]), layout.header[0] + layout.header[-1])
    if wide and stated == 2**32 - 1:
        file.seek(wide)
        stated, field = int.from_bytes(file.read(8), "little"), (wide, "<Q")
        end = body + stated
    after = _chunk(file, size, layout, max(end, body))
    if end <= start and after and after[2] <= size:
        return None  # other chunks follow an empty one, so that its length is true
    return Extent(start, end, size, stated, field)


def _sphere_extent(file: BinaryIO, size: int) -> Extent | None:
    """See `_extent`, for NIST SPHERE, whose header is text."""
    file.seek(0)
    header = file.read(1024)
    fields = dict(re.findall(rb"(\w+) -[irs]\d* (\S+)", header))
    try:
        start = int(header.split(b"\n")[1])
        stated = prod(int(fields[name]) for name in (b"sample_count", b"channel_count", b"sample_n_bytes"))
    except (IndexError, KeyError, ValueError):
        return None
    return None if b"," in fields.get(b"sample_coding", b"") else Extent(start, start + stated, size, stated)


def _ogg_extent(file: BinaryIO, size: int) -> Extent:
    """See `_extent`. Pages state only their own length, and the last one that the stream ends."""
    at, is_closed = 0, False
    while at < size:
        file.seek(at)
        header = file.read(27)
        if header[:4] != b"OggS"[: len(header)]:  # such as a tag behind the stream
            break
        header = header.ljust(27, b"\0")
        at += 27 + header[26] + sum(file.read(header[26]))
        is_closed = bool(header[5] & 4)
    return Extent(0, at, size, at, is_closed=is_closed or at != size)


def _boxes_end(file: BinaryIO, size: int) -> int:
    """End of the boxes of an MP4 file that hold its index and its media."""
    at, last = 0, 0
    while at + 8 <= size:
        file.seek(at)
        length, name = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8).ljust(8, b"\0"))
        elif length == 0:  # the last box
            length = size - at
        if length < 8:
            break
        at += length
        if name in (b"moov", b"moof", b"mdat"):
            last = at
    return last


def _segment_end(file: BinaryIO) -> int:
    """End of the segment of a Matroska file, which is all of it; 0 if it is not stated."""

    def length() -> int:
        first = int.from_bytes(file.read(1))
        width = 9 - first.bit_length()  # in bytes: the first bit that is set marks it, and the others are the value
        rest, most = file.read(width - 1), 2 ** (7 * width) - 1
        value = int.from_bytes(bytes([first]) + rest) & most
        return value if len(rest) == width - 1 and value < most else 0  # all bits set: unknown

    file.seek(4)
    file.seek(length(), os.SEEK_CUR)
    is_segment, stated = file.read(4) == b"\x18\x53\x80\x67", length()
    return file.tell() + stated if is_segment and stated else 0


def _mp3_end(file: BinaryIO) -> int:
    """End of the frames of an MP3 file according to the tag (Xing or Info) in its first frame; 0 without one."""
    file.seek(0)
    head, start = file.read(10).ljust(10, b"\0"), 0
    if head[:3] == b"ID3":
        start = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        start += 10 if head[5] & 16 else 0  # a footer
    file.seek(start)
    frame = file.read(64)
    tag = re.search(rb"Xing|Info", frame)
    if frame[:1] != b"\xff" or not tag or len(frame) < tag.end() + 12:
        return 0
    flags, _, stated = struct.unpack_from(">III", frame, tag.end())
    return start + stated if flags & 3 == 3 else 0
