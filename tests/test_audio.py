import io
import os
import re
import struct
import tracemalloc
from fractions import Fraction
from functools import cache

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Speech2TextFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from xattn import audio as xa
from xattn.audio import SAMPLE_RATE, cmvn, load_audio, log_mel, mel_centres, seconds_of
from xattn.containers import is_placeholder
from xattn.data.utterance import Utterance, hash_samples, utterance_from_recording

RATE = xa.SAMPLE_RATE


def tone(seconds, rate=RATE, frequency=440.0, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def chirp_in_noise(seconds=2.0, seed=0):
    """A sweep from 100 Hz to 7.3 kHz with white noise 30 dB below it."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(time.size)
    return (0.3 * np.sin(2 * np.pi * (100 + 3600 / seconds * time) * time) + 0.007 * noise).astype(np.float32)


def test_constants_are_whole_samples():
    assert Fraction(str(xa.WINDOW_SECONDS)) * RATE == xa.WINDOW_SAMPLES == 400
    assert Fraction(str(xa.FRAME_SECONDS)) * RATE == xa.FRAME_SAMPLES == 160


@pytest.mark.parametrize("extension", ["wav", "flac"])
def test_samples_at_16_khz_are_unchanged(tmp_path, extension):
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, 4000).astype(np.int16)
    soundfile.write(tmp_path / f"a.{extension}", integers, RATE)
    audio = load_audio(tmp_path / f"a.{extension}")
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(audio, integers / 2**15)


@given(channels=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_channels_are_averaged(tmp_path_factory, channels, seed):
    path = tmp_path_factory.mktemp("audio") / "a.wav"
    samples = np.random.default_rng(seed).uniform(-1, 1, (800, channels)).astype(np.float32)
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), samples.astype(np.float64).mean(axis=1), atol=1e-6)


def test_samples_in_memory_are_those_of_a_file(tmp_path):
    samples, path = np.random.default_rng(0).uniform(-0.9, 0.9, (2000, 2)).astype(np.float32), tmp_path / "a.wav"
    soundfile.write(path, samples, 44_100, subtype="FLOAT")
    expected = load_audio(path)
    assert expected.shape == (-(-2000 * RATE // 44_100),)
    same = [
        load_audio(str(path)),
        load_audio(path.read_bytes()),
        load_audio(io.BytesIO(path.read_bytes())),
        load_audio(path, rate=44_100),
        load_audio(samples, rate=44_100),
        load_audio(samples.T, rate=44_100),
        load_audio(torch.from_numpy(samples).requires_grad_(), rate=44_100),
        load_audio((44_100, samples)),
        load_audio((np.int64(44_100), samples.astype(np.float64))),
        load_audio({"array": samples, "sampling_rate": 44_100, "path": None}),
        load_audio({"array": samples.tolist(), "sampling_rate": 44_100.0}),
    ]
    with path.open("rb") as file:
        same.append(load_audio(file))
    for number, audio in enumerate(same):
        assert audio.dtype == np.float32
        np.testing.assert_allclose(audio, expected, atol=1e-6, err_msg=str(number))


@pytest.mark.parametrize(("dtype", "subtype"), [(np.int16, "PCM_16"), (np.int32, "PCM_32"), (np.uint8, "PCM_U8")])
def test_integers_are_divided_by_their_full_scale(tmp_path, dtype, subtype):
    limits = np.iinfo(dtype)
    integers = np.random.default_rng(0).integers(limits.min, limits.max, 800, dtype=dtype, endpoint=True)
    # soundfile writes 8-bit samples from 16-bit ones.
    written = (integers.astype(np.int16) - 128) << 8 if dtype == np.uint8 else integers
    soundfile.write(tmp_path / "a.wav", written, RATE, subtype=subtype)
    audio = load_audio(integers, RATE)
    np.testing.assert_allclose(audio, load_audio(tmp_path / "a.wav"), rtol=1e-6)
    assert audio.min() < -0.95 and audio.max() > 0.95


@pytest.mark.parametrize(
    ("audio", "rate", "kind", "message"),
    [
        (tone(0.5), None, ValueError, r"The rate of the samples is not given: add it in Hz, such as rate=16000\."),
        (tone(0.5), 0, ValueError, "The rate of the samples is 0: give a whole number of Hz"),
        (tone(0.5), 22_050.5, ValueError, "The rate of the samples is 22050.5: give a whole number of Hz"),
        (tone(0.5), np.nan, ValueError, "The rate of the samples is nan: give a whole number of Hz"),
        (tone(0.5), "16k", ValueError, "The rate of the samples is 16k: give a whole number of Hz"),
        ({"array": tone(0.5), "sampling_rate": None}, None, ValueError, "is None: give a whole number of Hz"),
        ((8000, tone(0.5)), 16_000, ValueError, "The audio given is at 8000 Hz, not 16000 Hz: leave out rate"),
        (np.zeros((0, 2)), RATE, ValueError, "The audio given holds no samples: record or export it again"),
        (np.ones((2, 3, 4)), RATE, ValueError, r"has shape \(2, 3, 4\) and type float64: give real samples"),
        (np.array(["a"]), RATE, ValueError, r"has shape \(1,\) and type <U1: give real samples"),
        (None, None, TypeError, "A NoneType is not a recording: give a path, an open file, samples with rate="),
        ([0.1, 0.2], RATE, TypeError, "A list is not a recording: give a path"),
        ({"samples": tone(0.5)}, RATE, TypeError, "A dict is not a recording: give a path"),
    ],
)
def test_what_is_not_a_recording_raises(audio, rate, kind, message):
    with pytest.raises(kind, match=message) as error:
        load_audio(audio, rate)
    assert "\n" not in str(error.value)


def test_the_rate_of_a_file_cannot_be_changed(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), RATE)
    with pytest.raises(ValueError, match=r"a\.wav is at 16000 Hz, not 8000 Hz: leave out rate\."):
        load_audio(tmp_path / "a.wav", 8000)


def test_the_length_of_a_file_is_read_from_its_header(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 44_100)
    assert seconds_of(tmp_path / "a.wav") == 8000 / 44_100
    encode(tmp_path / "a.m4a", tone(1.0), RATE, "aac")
    assert seconds_of(tmp_path / "a.m4a") == pytest.approx(1.0, abs=0.1)
    with pytest.raises(FileNotFoundError, match="There is no audio file"):
        seconds_of(tmp_path / "b.wav")


@given(
    source=st.sampled_from([8000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000]),
    frequency=st.floats(100, 3000),
    seconds=st.floats(0.2, 1.0),
)
@settings(max_examples=25, deadline=None)
def test_resampling_keeps_length_and_waveform(tmp_path_factory, source, frequency, seconds):
    path = tmp_path_factory.mktemp("audio") / "a.wav"
    samples = tone(seconds, source, frequency)
    soundfile.write(path, samples, source, subtype="FLOAT")
    audio = load_audio(path)
    assert audio.dtype == np.float32
    assert audio.size == -(-samples.size * RATE // source)
    inside = slice(RATE // 50, -RATE // 50)  # the filter sees silence beyond the ends
    expected = tone(2.0, RATE, frequency)[: audio.size]
    np.testing.assert_allclose(audio[inside], expected[inside], atol=0.005)
    np.testing.assert_array_equal(load_audio(samples, source), audio)


def test_resampling_removes_frequencies_above_the_nyquist_frequency(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 44_100, 12_000), 44_100)
    assert np.abs(load_audio(tmp_path / "a.wav")[400:-400]).max() < 0.005


@pytest.mark.parametrize(
    ("name", "codec", "codec_rate"),
    [("a.m4a", "aac", None), ("a.mp4", "aac", None), ("a.webm", "libopus", 48_000), ("a.mp3", "libmp3lame", None)],
)
def test_compressed_formats_are_read(tmp_path, name, codec, codec_rate):
    original = tone(1.0)
    encode(tmp_path / name, original, RATE, codec, codec_rate)
    audio = load_audio(tmp_path / name)
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(load_audio((tmp_path / name).read_bytes()), audio)
    assert original.size <= audio.size <= original.size + 1024  # AAC fills up its last frame
    middle = slice(2000, 14_000)
    assert np.corrcoef(audio[middle], original[middle])[0, 1] > 0.999
    assert np.std(audio[middle]) == pytest.approx(np.std(original[middle]), rel=0.1)  # lossy codecs


def test_mp3_without_a_stated_length_is_read_to_its_end(tmp_path):
    # A loud start makes libsndfile believe the file is several times shorter than it is.
    loud = np.random.default_rng(0).normal(0, 0.3, 10 * RATE).astype(np.float32)
    path, samples = tmp_path / "a.mp3", np.concatenate([loud, 0.001 * loud])
    encode(path, samples, RATE, "libmp3lame", quality=4, options={"write_xing": "0"})
    assert soundfile.info(path).frames < 0.5 * samples.size
    assert samples.size <= load_audio(path).size < samples.size + 4000


def test_a_guessed_mp3_length_is_not_an_announced_one(tmp_path):
    # A quiet start makes FFmpeg believe the file is much longer than it is.
    loud = np.random.default_rng(0).normal(0, 0.3, 5 * RATE).astype(np.float32)
    path, samples = tmp_path / "a.mp3", np.concatenate([0.001 * loud, loud])
    encode(path, samples, RATE, "libmp3lame", quality=4, options={"write_xing": "0"})
    with av.open(str(path)) as container:
        assert container.duration / av.time_base > 15
    assert samples.size <= load_audio(path).size < samples.size + 4000


@pytest.mark.parametrize(
    ("name", "codec", "codec_rate", "quality"),
    [
        ("a.m4a", "aac", None, None),
        ("a.mp4", "aac", None, None),
        ("a.webm", "libopus", 48_000, None),
        ("a.mp3", "libmp3lame", None, None),
        ("a.mp3", "libmp3lame", None, 4),
    ],
)
def test_a_truncated_compressed_recording_raises(tmp_path, name, codec, codec_rate, quality):
    path, options = tmp_path / name, {"movflags": "faststart"} if codec == "aac" else None
    encode(path, tone(6.0), RATE, codec, codec_rate, quality, options)
    assert load_audio(path).size >= 6 * RATE
    content = path.read_bytes()
    for share in (0.5, 0.8):
        path.write_bytes(content[: int(share * len(content))])
        found = int(share * len(content))
        message = rf"{name} ends after {found} of the (\d+) bytes it announces: replace it with a complete copy\."
        with pytest.raises(ValueError, match=message) as error:
            load_audio(path)
        assert found < int(re.search(message, str(error.value))[1]) <= len(content)


def test_a_video_longer_than_its_sound_is_read(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        sound, picture = (
            container.add_stream("libopus", rate=48_000, layout="mono"),
            container.add_stream("mpeg4", rate=5),
        )
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        frame = av.AudioFrame.from_ndarray(tone(1.0)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for source in (frame, None):
            container.mux(sound.encode(source))
        for number in range(20):
            image = av.VideoFrame.from_ndarray(np.full((32, 32, 3), number, np.uint8))
            container.mux(picture.encode(image))
        container.mux(picture.encode(None))
    with av.open(str(path)) as container:
        assert container.duration / av.time_base > 3.9
    assert RATE <= load_audio(path).size < 1.1 * RATE


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no audio file .*a\.wav: check the path\."):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("content", [b"not audio at all", bytes(range(256)) * 40])
def test_an_unreadable_file_raises(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.wav cannot be read as audio: convert it to WAV or FLAC"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=r"The audio given cannot be read as audio: convert it to WAV or FLAC"):
        load_audio(content)


def test_a_video_without_sound_raises(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for source in (av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8)), None):
            container.mux(stream.encode(source))
    with pytest.raises(ValueError, match=r"a\.mp4 holds no audio track: choose a file with sound\."):
        load_audio(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0), r"holds no samples: record"),
        (np.r_[tone(0.5), np.nan], r"holds samples that are not finite \(NaN or infinity\): record"),
        (np.r_[tone(0.5), np.inf], r"holds samples that are not finite \(NaN or infinity\): record"),
        (np.zeros(8000), r"is silent \(every sample is 0\): record"),
        (np.full(8000, 0.25), r"is silent \(every sample is 0\.25\): record"),
        (np.zeros((8000, 2)), r"is silent \(every sample is 0\): record"),
        (np.stack([np.full(8000, 0.1), np.full(8000, -0.1)], axis=1), r"is silent \(every sample is 0\): record"),
    ],
)
def test_unusable_audio_raises(tmp_path, samples, message):
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav.* " + message):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="The audio given " + message):
        load_audio(samples, RATE)
    if samples.ndim == 1:
        with pytest.raises(ValueError, match="The audio given " + message):
            log_mel(samples)


@pytest.mark.parametrize("samples", [tone(0.03), np.zeros(480)])
def test_a_short_recording_is_short_rather_than_silent(tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    message = r"lasts 30\.0 ms, less than the 35 ms of two frames: use a longer recording\."
    with pytest.raises(ValueError, match=r"a\.wav " + message):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="The audio given " + message):
        load_audio(samples, RATE)
    with pytest.raises(ValueError, match=r"lasts 24\.9 ms, less than one window of 25 ms: use a longer recording\."):
        log_mel(tone(0.0249))


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_the_shortest_recording_has_two_frames(rate):
    least = -(-rate * 35 // 1000)  # 35 ms, rounded up
    audio = load_audio(chirp_in_noise()[:least], rate)
    assert len(log_mel(audio)) == 2
    assert cmvn(log_mel(audio)).any()
    with pytest.raises(ValueError, match=r"lasts 3[45]\.\d ms, less than the 35 ms of two frames"):
        load_audio(chirp_in_noise()[: least - 1], rate)


# Channels


def in_stereo(left, right):
    return np.stack([left, right], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("right", "noise", "level"),
    [(-1.0, 0.0, "silent"), (-1.0, 1e-4, "7[0-9] dB weaker than they are"), (-0.9, 0.0, "26 dB weaker than they are")],
)
@pytest.mark.parametrize("offset", [0.0, 0.25])
def test_channels_that_cancel_each_other_raise(tmp_path, right, noise, level, offset):
    left = np.round(2**15 * chirp_in_noise()) / 2**15  # float32 adds the offset exactly
    samples = in_stereo(left, right * left + noise * np.random.default_rng(1).standard_normal(left.size)) + offset
    message = rf"has 2 channels that cancel each other \(their average is {level}\): choose one, such as channel=0\.$"
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="DOUBLE")
    with pytest.raises(ValueError, match=r"a\.wav " + message):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="^The audio given " + message):
        load_audio(samples, RATE)
    for channel in (0, 1):
        np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", channel=channel), samples[:, channel])


@given(channels=st.integers(2, 32), gain=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_channels_that_differ_are_averaged(channels, gain, seed):
    """Independent channels, a silent one, and one that another one weakens are ordinary recordings."""
    noise = np.random.default_rng(seed).standard_normal((4000, channels)).astype(np.float32)
    noise[:, 1] *= gain
    opposite = in_stereo(noise[:, 0], -0.8 * noise[:, 0])
    for samples in (noise, opposite):
        np.testing.assert_array_equal(load_audio(samples, RATE), samples.mean(axis=1, dtype=np.float32))


def test_a_channel_of_any_recording_can_be_chosen(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (4410, 3)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    for channel in (0, 1, 2, np.int64(2)):
        expected = load_audio(samples[:, channel], 44_100)
        for audio in (tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes(), (44_100, samples), (44_100, samples.T)):
            np.testing.assert_array_equal(load_audio(audio, channel=channel), expected)
            np.testing.assert_array_equal(utterance_from_recording(audio, channel=channel).samples, expected)


@pytest.mark.parametrize("channel", [-1, 2, "0", 1.0, True])
def test_a_channel_that_does_not_exist_raises(channel):
    with pytest.raises(ValueError, match=rf"given has no channel {channel!r}: choose one from 0 to 1\."):
        load_audio(in_stereo(tone(0.5), tone(0.5)), RATE, channel)
    with pytest.raises(ValueError, match=rf"given has no channel {channel!r}: choose channel 0, its only one\."):
        load_audio(tone(0.5), RATE, channel)
    np.testing.assert_array_equal(load_audio(tone(0.5), RATE, 0), tone(0.5))


def test_infinite_channels_do_not_cancel_each_other():
    samples = in_stereo(np.full(8000, np.inf), np.full(8000, -np.inf))
    with pytest.raises(ValueError, match=r"holds samples that are not finite"):
        load_audio(samples, RATE)


# Files that cannot be opened


def test_what_is_not_a_readable_file_is_named_as_such(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "empty.wav").touch()
    (tmp_path / "dangling.wav").symlink_to("nothing.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    for name, kind, message in (
        ("missing.wav", FileNotFoundError, r"There is no audio file .*missing\.wav: check the path\."),
        ("dangling.wav", FileNotFoundError, r"There is no audio file .*dangling\.wav: check the path\."),
        ("empty.wav/a.wav", FileNotFoundError, r"There is no audio file .*empty\.wav/a\.wav: check the path\."),
        ("a\0.wav", FileNotFoundError, r"There is no audio file .*a\0\.wav: check the path\."),
        ("folder.wav", IsADirectoryError, r"folder\.wav is a folder: give the path of an audio file\."),
        ("empty.wav", ValueError, r"empty\.wav is empty \(0 bytes\): record or export it again\."),
        ("pipe.wav", OSError, r"pipe\.wav is a pipe or a device: pass it as an open file, or save the recording in a"),
        ("loop.wav", OSError, r"loop\.wav cannot be opened \(.*\): check the path and the disk\."),
        ("bad\udcff.wav", ValueError, r"The file name '.*bad\\udcff\.wav' is not valid text: rename the file\."),
    ):
        for read in (load_audio, seconds_of):
            with pytest.raises(kind, match=message) as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)


def test_a_file_without_permission_is_named_as_such(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.wav"
    path.parent.mkdir()
    soundfile.write(path, tone(0.5), RATE)
    path.chmod(0o444)  # one that cannot be written can be read
    assert load_audio(path).size == 8000
    message = rf"The permission to read {path} is denied: change the permissions of the file or of its folder\.$"
    with monkeypatch.context() as patch:
        if os.geteuid():
            path.chmod(0)
        else:  # root may read everything

            def denied(*_):
                raise PermissionError(13, "Permission denied")

            patch.setattr("builtins.open", denied)
        for read in (load_audio, seconds_of):
            with pytest.raises(PermissionError, match=message):
                read(path)
    assert path.is_file()


@pytest.mark.parametrize("audio", [b"", io.BytesIO()])
def test_nothing_to_read_raises(audio):
    with pytest.raises(
        ValueError, match="The audio given has no bytes to read: rewind it if it is an open file, or re"
    ):
        load_audio(audio)


def test_a_file_open_as_text_raises(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), RATE)
    with (
        (tmp_path / "a.wav").open() as file,
        pytest.raises(TypeError, match=r"The file given is open as text: open it with mode 'rb'\."),
    ):
        load_audio(file)


@pytest.mark.parametrize("name", ["12:30.mp3", "concat:a.mp3", "a%03d.mp3", "a?b=1#.mp3", "a.raw", "a.txt", "è ü.mp3"])
def test_a_name_does_not_matter(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without folders, a colon could end a protocol
    soundfile.write("a.mp3", tone(1.0), RATE)
    expected = load_audio("a.mp3")
    os.replace("a.mp3", name)
    np.testing.assert_array_equal(load_audio(name), expected)
    assert seconds_of(name) == pytest.approx(1.0, abs=0.1)


# Lengths that containers state

SECONDS, SAMPLES = 1.0, 16_000
UNCOMPRESSED = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAVEX", "FLOAT"),
    ("AIFF", "PCM_24"),
    ("AU", "ULAW"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
]


class Pipe:
    """A file that cannot be rewound to correct its header."""

    name = "pipe"

    def __init__(self):
        self.content = b""

    def write(self, part):
        self.content += bytes(part)
        return len(part)


@cache
def recorded(container, codec, rate=RATE, piped=False, **options):
    """A second of a tone, written by soundfile (a format and subtype in capitals) or by FFmpeg."""
    if container.isupper():
        file = io.BytesIO()
        soundfile.write(file, tone(SECONDS, rate), rate, format=container, subtype=codec)
        return file.getvalue()
    file = Pipe() if piped else io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(SECONDS, rate)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for source in (frame, None):
            output.mux(stream.encode(source))
    return file.content if piped else file.getvalue()


def refusal(content):
    """The sentence with which bytes are refused, or the number of samples read."""
    try:
        return load_audio(content).size
    except ValueError as error:
        return str(error)


STATED = {
    **{f"{container} {codec}": (container, codec) for container, codec in UNCOMPRESSED},
    "WAV with ADPCM": ("WAV", "IMA_ADPCM"),
    "WAV with GSM 6.10": ("WAV", "GSM610"),
    "CAF with ALAC": ("CAF", "ALAC_16"),
    "NIST SPHERE": ("NIST", "PCM_16"),
    "Vorbis": ("OGG", "VORBIS"),
    "Opus": ("OGG", "OPUS"),
    "MP3": ("mp3", "libmp3lame"),
    "MP3 by libsndfile": ("MP3", "MPEG_LAYER_III"),
    "M4A": ("ipod", "aac"),
    "MOV": ("mov", "pcm_s16le"),
    "Matroska": ("matroska", "flac"),
    "AVI": ("avi", "pcm_s16le"),
}


@pytest.mark.filterwarnings("ignore:Exception ignored from cffi callback")  # soundfile seeks to before the start
@given(recording=st.sampled_from(sorted(STATED)), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_cut_off_anywhere_is_refused_with_both_lengths(recording, data):
    content = recorded(*STATED[recording])
    whole = load_audio(content).size
    assert SAMPLES <= whole < SAMPLES + 1200
    found = data.draw(st.integers(1, len(content) - 1) | st.integers(1, 40).map(lambda lost: len(content) - lost))
    sentence = refusal(content[:found])
    if sentence == whole:  # only an index behind the audio is cut off
        return
    lengths = re.fullmatch(
        r"The audio given ends after (\d+) of the (\d+) bytes it announces: replace it with a complete copy\.",
        str(sentence),
    )
    if lengths:
        assert int(lengths[1]) == found < int(lengths[2]) <= len(content)
    else:  # the header itself is cut off
        assert re.search(
            r"given (cannot be read as audio|holds no samples|can be read for only 0.00 of the 1)", str(sentence)
        )
        assert found < (6000 if recording.startswith(("AVI", "CAF")) else 1200)


@given(found=st.integers(1, len(recorded("FLAC", "PCM_16")) - 1))
@settings(max_examples=25, deadline=None)
def test_a_flac_cut_off_anywhere_is_refused_with_both_lengths(found):
    content = recorded("FLAC", "PCM_16")
    sentence = refusal(content[:found])
    lengths = re.search(r"can be read for only (\d+) of the 16000 samples it announces: replace it with", sentence)
    if lengths:
        assert int(lengths[1]) == 4096 * (int(lengths[1]) // 4096) < SAMPLES
    else:
        assert found < 200 and "cannot be read as audio" in sentence


@pytest.mark.parametrize("announced", [16_001, 20_000, 10**9])
def test_a_plausible_length_is_believed(announced):
    message = rf"can be read for only 16000 of the {announced} samples it announces: replace it with a complete copy"
    with pytest.raises(ValueError, match=message):
        load_audio(with_flac_length(recorded("FLAC", "PCM_16"), announced))
    content = bytearray(recorded("WAV", "PCM_16"))
    content[40:44] = struct.pack("<I", 2 * announced if announced < 10**9 else announced)
    message = r"ends after 32044 of the \d+ bytes it announces: replace it with a complete copy"
    with pytest.raises(ValueError, match=message):
        load_audio(bytes(content))


@given(stated=st.booleans(), position=st.integers(500, 6000), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_a_damaged_flac_raises(stated, position, bit):
    """Damage before the last frame, whose loss goes unnoticed if no length is stated."""
    content = bytearray(recorded("FLAC", "PCM_16") if stated else recorded("flac", "flac", piped=True))
    content[-position] ^= 1 << bit
    sentence = refusal(bytes(content))
    assert re.search(r"can be read for only \d+ of the 16000 samples|cannot be read as audio", str(sentence))


@pytest.mark.parametrize(
    "recording",
    [
        ("adts", "aac"),
        ("amr", "amr_nb", 8000),
        ("webm", "libopus", 48_000, True),
        ("mp3", "libmp3lame", RATE, True),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_recording_that_states_no_length_is_read_to_its_end(recording, share):
    content = recorded(*recording)
    found = load_audio(content[: int(share * len(content))]).size
    assert share * SAMPLES - 2500 < found < share * SAMPLES + 2500


def test_an_ogg_stream_without_its_last_page_is_reported(tmp_path, capsys):
    path, content = tmp_path / "a.opus", recorded("ogg", "libopus", 48_000)
    path.write_bytes(content + b"TAG" + bytes(125))  # a tag that some programs add
    whole = load_audio(path)
    np.testing.assert_array_equal(load_audio(content), whole)
    path.write_bytes(without_end(content))
    assert seconds_of(path) == pytest.approx(SECONDS, abs=0.01)
    assert capsys.readouterr().out == ""
    audio = load_audio(path)  # only the last page says that the stream ends within a packet
    assert SAMPLES <= audio.size < SAMPLES + 320
    np.testing.assert_allclose(audio[: SAMPLES - 100], whole[: SAMPLES - 100], atol=1e-6)
    message = f"{path} lacks the page that ends an Ogg stream: if the recording is incomplete, replace it.\n"
    assert capsys.readouterr().out == message


def without_end(content):
    """An Ogg file whose last page does not say that the stream ends."""
    at = content.rindex(b"OggS")
    page = bytearray(content[at:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x104C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    page[22:26] = struct.pack("<I", checksum)
    return content[:at] + bytes(page)


def with_length(container, number):
    """A recording whose header states a length of this number: modulo its field, and including what that counts."""
    content = bytearray(recorded(container, "PCM_16"))
    data = content.find(b"data")
    fields = {
        "WAV": [("<I", 4), ("<I", data + 4)],
        "AIFF": [(">I", 4), (">I", content.find(b"COMM") + 10), (">I", content.find(b"SSND") + 4)],
        "AU": [(">I", 8)],
        "CAF": [(">Q", data + 4)],
        "W64": [("<Q", 16), ("<Q", data + 16)],
        "RF64": [("<Q", 20), ("<Q", 28), ("<Q", 36)],
    }
    for kind, at in fields[container]:
        struct.pack_into(kind, content, at, number % 2 ** (8 * struct.calcsize(kind)))
    return bytes(content)


def with_flac_length(content, samples):
    """A FLAC file that states this number of samples, in the last 36 bits of its 8 bytes from byte 18."""
    kept = int.from_bytes(content[18:26], "big") >> 36 << 36
    return content[:18] + (kept | samples).to_bytes(8, "big") + content[26:]


@pytest.mark.parametrize("number", [0, 0x7F000000, 0x7FFFF000, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("container", ["WAV", "AIFF", "AU", "CAF", "W64", "RF64"])
def test_placeholders_of_a_length_are_read_to_the_end(tmp_path, container, number):
    expected, path = load_audio(recorded(container, "PCM_16")), tmp_path / "a"
    path.write_bytes(with_length(container, number))
    for audio in (path, path.read_bytes()):
        np.testing.assert_array_equal(load_audio(audio), expected)
    assert seconds_of(path) == SECONDS


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("wav", "pcm_s16le"),
        ("wav", "pcm_f32le"),
        ("wav", "libmp3lame"),
        ("aiff", "pcm_s16be"),
        ("au", "pcm_s16be"),
        ("caf", "pcm_s16be"),
        ("w64", "pcm_s16le"),
        ("flac", "flac"),
        ("avi", "pcm_s16le"),
        ("ogg", "flac"),
    ],
)
def test_recordings_written_to_a_pipe_are_read_to_the_end(tmp_path, container, codec):
    content, expected = recorded(container, codec, piped=True), load_audio(recorded(container, codec))
    assert SAMPLES <= expected.size < SAMPLES + 1300
    (tmp_path / "a").write_bytes(content)
    np.testing.assert_array_equal(load_audio(content), expected)
    assert seconds_of(tmp_path / "a") == pytest.approx(expected.size / RATE)


def test_an_rf64_file_written_to_a_pipe_is_read_to_the_end():
    content = recorded("wav", "pcm_s16le", piped=True, rf64="always")
    assert content.startswith(b"RF64\xff\xff\xff\xffWAVEds64") and content[20:48] == bytes(28)
    np.testing.assert_array_equal(load_audio(content), load_audio(recorded("wav", "pcm_s16le")))


@pytest.mark.parametrize("riff", [0, 36, 32_036, 2**32 - 1])
def test_a_wav_whose_recorder_was_killed_is_read_to_the_end(riff):
    content = bytearray(recorded("WAV", "PCM_16"))
    content[4:8], content[40:44] = struct.pack("<I", riff), bytes(4)
    np.testing.assert_array_equal(load_audio(bytes(content)), load_audio(recorded("WAV", "PCM_16")))


def test_a_wav_without_samples_does_not_read_other_chunks():
    content = recorded("WAV", "PCM_16")[:40] + bytes(4) + b"LIST" + struct.pack("<I", 4000) + 1000 * b"INFO"
    with pytest.raises(ValueError, match="The audio given holds no samples: record or export it again"):
        load_audio(content)


def test_chunks_without_padding_do_not_look_like_missing_audio():
    content = recorded("WAV", "PCM_16")
    note = b"LIST" + struct.pack("<I", 5) + b"INFO!"  # the standard wants a sixth byte
    np.testing.assert_array_equal(load_audio(content + note), load_audio(content))
    with_note = content[:36] + note + content[36:]
    assert "bytes it announces" not in str(refusal(with_note))


@pytest.mark.parametrize("samples", [0, 2**31 - 1, 2**32 - 1, 2**35, 2**36 - 1])
def test_absurd_lengths_of_flac_are_read_to_the_end_in_little_memory(tmp_path, samples):
    path = tmp_path / "a.flac"
    path.write_bytes(with_flac_length(recorded("FLAC", "PCM_16"), samples))
    tracemalloc.start()
    audio = load_audio(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(audio, load_audio(recorded("FLAC", "PCM_16")))
    assert peak < 50e6
    assert seconds_of(path) == SECONDS


@pytest.mark.parametrize("samples", [0, 2**36 - 1])
def test_a_corpus_may_have_flac_without_a_length(tmp_path, samples):
    content, path = recorded("FLAC", "PCM_16"), tmp_path / "a.flac"
    digest = hash_samples(soundfile.read(io.BytesIO(content), dtype="int16")[0])
    path.write_bytes(with_flac_length(content, samples))
    utterance = Utterance("a", path, "en", SECONDS, sha256=digest, manifest=tmp_path / "manifest.csv", row=2)
    np.testing.assert_array_equal(utterance.audio(), load_audio(content))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"manifest\.csv row 2 \(id a\): .*a\.flac is empty \(0 bytes\): record or"):
        utterance.audio()
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"manifest\.csv row 2 \(id a\): There is no audio file .*a\.flac: check"
    ):
        utterance.audio()


@pytest.mark.parametrize(
    ("count", "seconds", "placeholder"),
    [
        (16_000, 1.0, False),
        (1, 86_400.0, False),
        (1, 86_401.0, True),
        (2**31 - 2**24 - 1, 60.0, False),
        (0x7F000000, 60.0, True),
        (0x80000024, 60.0, True),
        (3 * 2**30, 60.0, False),
        (2**32 - 1, 60.0, True),
    ],
)
def test_placeholders_are_near_the_largest_numbers_or_exceed_a_day(count, seconds, placeholder):
    assert is_placeholder(count, seconds) is placeholder


@pytest.mark.parametrize(
    ("container", "codec"), [("WAV", "GSM610"), ("AU", "G721_32"), ("WAV", "NMS_ADPCM_16"), ("wav", "libmp3lame")]
)
def test_telephone_codecs_are_read(container, codec):
    audio, original = load_audio(recorded(container, codec)), tone(SECONDS)
    assert SAMPLES <= audio.size < SAMPLES + 2000
    found = max(np.corrcoef(audio[lag : lag + 12_000], original[:12_000])[0, 1] for lag in range(1200))
    assert found > 0.98


def test_a_title_in_another_encoding_is_ignored():
    content = recorded("wav", "libmp3lame")
    title = b"INFOINAM" + struct.pack("<I", 4) + "Café".encode("latin1")
    data = content.index(b"data")
    titled = content[:data] + b"LIST" + struct.pack("<I", len(title)) + title + content[data:]
    np.testing.assert_array_equal(load_audio(titled), load_audio(content))


@pytest.mark.parametrize("wrong", [np.ones((2, 8000), np.float32), np.arange(8000, dtype=np.int16)])
def test_log_mel_needs_one_channel_of_floats(wrong):
    message = r"but one channel of floats in \[-1, 1\] is needed: pass it through xattn\.audio\.load_audio"
    with pytest.raises(ValueError, match=message):
        log_mel(wrong)


@pytest.mark.parametrize("silence", [0, 8000])
def test_log_mel_equals_the_reference_front_end(silence):
    audio = chirp_in_noise()
    audio[:silence] = 0  # these frames are at Kaldi's floor
    extractor = Speech2TextFeatureExtractor(do_ceptral_normalize=False)
    expected = extractor(audio, sampling_rate=RATE).input_features[0]
    features = log_mel(audio)
    assert features.dtype == np.float32
    assert features.shape == expected.shape == ((audio.size - 400) // 160 + 1, 80)
    np.testing.assert_allclose(features, expected, atol=0.01)  # the range is about 30
    normalised = Speech2TextFeatureExtractor()(audio, sampling_rate=RATE).input_features[0]
    np.testing.assert_allclose(cmvn(features), normalised, atol=0.01)


@given(extra=st.integers(0, 2000))
@settings(max_examples=20, deadline=None)
def test_frames_lie_inside_the_audio(extra):
    assert log_mel(chirp_in_noise()[: 400 + extra]).shape == (extra // 160 + 1, 80)


def test_a_gain_shifts_log_mel_by_twice_its_logarithm():
    audio = chirp_in_noise()
    np.testing.assert_allclose(log_mel(audio) - log_mel(0.1 * audio), -2 * np.log(0.1), atol=0.01)


def test_mel_centres_are_the_peaks_of_the_filters():
    # The grid of this independent filterbank is so fine that each triangle's highest bin is its centre.
    bins = 32_001
    filters = mel_filter_bank(bins, 80, 20, 8000, RATE, mel_scale="kaldi", triangularize_in_mel_space=True)
    peaks = np.linspace(0, 8000, bins)[filters.argmax(axis=0)]
    centres = mel_centres()
    assert centres.shape == (80,)
    np.testing.assert_allclose(centres, peaks, atol=0.25)


@pytest.mark.parametrize("band", [20, 40, 60, 79])
def test_a_tone_at_a_centre_is_loudest_in_its_band(band):
    audio = tone(0.5, frequency=mel_centres()[band])
    assert (log_mel(audio).argmax(axis=1) == band).all()


@given(frames=st.integers(2, 40), scale=st.floats(1e-3, 1e3), offset=st.floats(-100, 100), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_cmvn_gives_mean_0_and_variance_1(frames, scale, offset, seed):
    features = scale * np.random.default_rng(seed).standard_normal((frames, 5)) + offset
    normalised = cmvn(features.astype(np.float32))
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose((normalised.astype(float) ** 2).mean(axis=0), 1, rtol=1e-4)
    np.testing.assert_allclose(cmvn(3 * features - 7), cmvn(features), atol=1e-5)


@pytest.mark.parametrize("frames", [1, 10])
def test_cmvn_sets_a_constant_band_to_0(frames):
    assert np.full(10, 0.1).cumsum()[-1] / 10 != 0.1  # the mean of the band is not exact
    np.testing.assert_allclose(cmvn(np.full((frames, 3), 0.1)), 0, atol=1e-12)


def test_uploads_beside_the_notebook_are_found(tmp_path, monkeypatch, capsys):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE).astype(np.float32)
    (tmp_path / "lessons").mkdir()
    soundfile.write(tmp_path / "lessons" / "voice.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^There is no audio file voice\.wav: check the path\.$"):
        load_audio("voice.wav")
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "lessons" / "08.ipynb"))
    np.testing.assert_array_equal(load_audio("voice.wav"), samples)
    assert capsys.readouterr().out == "voice.wav is read from the folder of this notebook.\n"
    own = utterance_from_recording("voice.wav")
    assert (own.id, own.audio_path) == ("voice", tmp_path / "lessons" / "voice.wav")
    capsys.readouterr()
    soundfile.write(tmp_path / "voice.wav", samples[::-1], SAMPLE_RATE, subtype="FLOAT")  # this one comes first
    np.testing.assert_array_equal(load_audio("voice.wav"), samples[::-1])
    monkeypatch.setenv("JPY_SESSION_NAME", "08.ipynb")  # of another client, without its folder
    assert capsys.readouterr().out == ""
