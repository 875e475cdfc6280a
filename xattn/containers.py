"""What the containers of recordings state about their length, in bytes, so that incomplete files are noticed."""

import io
import os
import re
import struct
from math import prod
from typing import BinaryIO, NamedTuple

DAY = 86_400.0  # seconds
PLACEHOLDERS, PLACEHOLDER_RANGE = (2**31, 2**32), 2**24  # see `is_placeholder`


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


def check_extent(extent: Extent, seconds: float, name: str) -> None:
    """ValueError: the file, of which so many seconds could be read, ends before its audio does."""
    if extent.end <= extent.size:
        return
    share = (extent.end - extent.start) / max(extent.size - extent.start, 1)
    if not is_placeholder(extent.stated, share * seconds):
        raise ValueError(
            f"{name} ends after {extent.size} of the {extent.end} bytes it announces: replace it with a complete copy."
        )


def restated(file: BinaryIO, extent: Extent) -> io.BytesIO:
    """Copy a file and set the length in its header to what it holds, because decoders trust even absurd lengths."""
    file.seek(0)
    content, (position, kind) = bytearray(file.read()), extent.field
    length = extent.stated + extent.size - extent.end
    struct.pack_into(kind, content, position, min(length, 2 ** (8 * struct.calcsize(kind)) - 1))
    return io.BytesIO(content)


def is_complete(path: str) -> bool:
    with open(path, "rb") as file:
        return extent_of(file).is_complete


def extent_of(file: BinaryIO) -> Extent:
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
    """See `extent_of`, for a container of chunks; None if it has no audio, or empty audio."""
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
    """See `extent_of`, for NIST SPHERE, whose header is text."""
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
    """See `extent_of`. Pages state only their own length, and the last one that the stream ends."""
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
