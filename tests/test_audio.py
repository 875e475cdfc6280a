import io
from fractions import Fraction

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
from xattn.audio import cmvn, load_audio, log_mel, mel_centres, seconds_of

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
        message = rf"{name} (ends after \d\.\d of the 6\.\d s it announces: replace|cannot be read as audio: convert)"
        with pytest.raises(ValueError, match=message):
            load_audio(path)


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


@pytest.mark.parametrize("content", [b"", b"not audio at all", bytes(range(256)) * 40])
def test_an_unreadable_file_raises(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.wav cannot be read as audio: convert it to WAV or FLAC"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=r"The audio given cannot be read as audio: convert it to WAV or FLAC"):
        load_audio(content)


def test_a_damaged_flac_raises(tmp_path):
    soundfile.write(tmp_path / "a.flac", chirp_in_noise(), RATE)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.flac cannot be read as audio|a\.flac ends after"):
        load_audio(tmp_path / "a.flac")


def test_fewer_samples_than_announced_raise(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(1.0), RATE)
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, **options: read(self, 100, **options))
    with pytest.raises(ValueError, match=r"a\.wav ends after 100 of the 16000 samples it announces: replace it"):
        load_audio(tmp_path / "a.wav")


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
        (np.stack([tone(0.5), -tone(0.5)], axis=1), r"is silent"),
        (tone(0.0249), r"lasts 24\.9 ms, less than one window of 25 ms: use a longer recording"),
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
