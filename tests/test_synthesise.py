"""Synthetic speech: voices, word times, repeatability; noise and reverberation against their definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_closing
from scipy.signal import welch

from recipes.room import NOISES, Talkers, noise, reverberate
from recipes.synthesise import HELD_OUT_VOICES, VOICES, speak
from xattn.audio import SAMPLE_RATE

SENTENCE = {
    "en": "the members thanked the president for his patience",
    "it": "i membri hanno ringraziato il presidente per la sua pazienza",
}


def log_spectrum(samples):
    return 10 * np.log10(welch(samples, SAMPLE_RATE, nperseg=512)[1] + 1e-12)


@pytest.mark.parametrize("language", ["en", "it"])
def test_every_voice_sounds_different(language):
    voices = VOICES[language] + HELD_OUT_VOICES[language]
    assert len(set(voices)) == len(voices) and len(VOICES[language]) >= 14 and len(HELD_OUT_VOICES[language]) == 4
    spectra = [log_spectrum(speak(SENTENCE[language], voice, 170, 50, seed=1)[0]) for voice in voices]
    for (one, a), (other, b) in itertools.combinations(zip(voices, spectra, strict=True), 2):
        assert np.abs(a - b).mean() > 1, f"{one} and {other}"  # dB


def test_held_out_speakers_are_not_in_training():
    for language in VOICES:
        speakers = {voice.partition("+")[2] for voice in VOICES[language]}
        assert not speakers & {voice.partition("+")[2] for voice in HELD_OUT_VOICES[language]}


def test_same_arguments_give_same_samples_in_any_order():
    requests = [
        (SENTENCE["en"], "gmw/en-US+m1", 150, 40, 1),
        (SENTENCE["en"], "gmw/en-GB-scotland+f3", 190, 60, 2),
        (SENTENCE["it"], "roa/it+m3", 170, 50, 3),
    ]
    first = [speak(*request) for request in requests]
    again = [speak(*request) for request in reversed(requests)][::-1]
    for (samples, words), (samples_again, words_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(samples, samples_again)
        assert words == words_again
    assert first[0][0].size != first[1][0].size


@pytest.mark.parametrize(
    ("text", "voice", "expected"),
    [
        (
            "The end of the debate: twenty-three members did not vote in the end.",
            "gmw/en-US+m1",
            ["The", "end", "of", "the", "debate", "twenty-three", "members", "did", "not", "vote", "in", "the", "end"],
        ),
        (
            "L'Unione non c'è più, perché l'ha detto il presidente dell'assemblea.",
            "roa/it+f2",
            ["L'Unione", "non", "c'è", "più", "perché", "l'ha", "detto", "il", "presidente", "dell'assemblea"],
        ),
    ],
)
def test_each_word_has_its_own_time(text, voice, expected):
    samples, words = speak(text, voice, 160, 50, seed=1)
    assert [word.text for word in words] == expected
    edges = [edge for word in words for edge in (word.start, word.end)]
    assert edges == sorted(edges) and all(word.end - word.start > 0.04 for word in words)
    assert words[0].start < 0.02 and samples.size / SAMPLE_RATE - 0.2 < words[-1].end <= samples.size / SAMPLE_RATE


@pytest.mark.parametrize("voice", ["gmw/en-US+Andy", "gmw/en-GB-x-rp+f1", "gmw/en-GB-scotland+m4"])
def test_word_times_match_the_energy_of_the_samples(voice):
    # The energy shows the pauses at the commas; the closing fills shorter gaps. Sonorants at the edges make them clear.
    samples, words = speak("more rain, no war, only money, any year, all along.", voice, 150, 50, seed=1)
    block = SAMPLE_RATE // 100
    level = np.sqrt(np.mean(samples[: samples.size // block * block].reshape(-1, block) ** 2, axis=1))
    loud = binary_closing(np.pad(level > 0.001 * level.max(), 5), np.ones(5))[4:-4]
    onsets, ends = np.flatnonzero(~loud[:-1] & loud[1:]) / 100, np.flatnonzero(loud[:-1] & ~loud[1:]) / 100
    np.testing.assert_allclose(onsets, [word.start for word in words[::2]], atol=0.02)
    np.testing.assert_allclose(ends, [word.end for word in words[1::2]], atol=0.02)


VOCABULARY = ["of", "the", "did", "not", "in", "a", "to", "be", "Mr", "votes,", "forty-two", "isn't", "it", "is", "EU"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=8))
def test_every_word_of_any_sequence_has_a_time(words):
    _, spans = speak(" ".join(words), "gmw/en-US+m1", 170, 50, seed=1)
    assert len(spans) == len(words)
    assert all(span.start < span.end for span in spans)
    assert all(one.end <= other.start for one, other in itertools.pairwise(spans))


@pytest.mark.parametrize("voice", ["gmw/en-US+nobody", "gmw/xx+m1", "gmw/en-US"])
def test_unknown_voice_is_an_error(voice):
    with pytest.raises(ValueError, match="has no voice"):
        speak("a word", voice, 170, 50, seed=1)


def test_word_of_punctuation_is_an_error():
    with pytest.raises(ValueError, match="consists only of punctuation"):
        speak("one - two", "gmw/en-US+m1", 170, 50, seed=1)


@pytest.fixture(scope="module")
def talkers():
    return Talkers(np.concatenate([speak(SENTENCE["en"], voice, 170, 50, 1)[0] for voice in VOICES["en"][:6]]))


@pytest.mark.parametrize("kind", NOISES)
def test_noise_has_power_one_and_depends_on_the_generator(kind, talkers):
    samples = noise(kind, 50_001, talkers, np.random.default_rng(1))
    assert samples.shape == (50_001,) and np.mean(samples**2) == pytest.approx(1)
    np.testing.assert_array_equal(samples, noise(kind, 50_001, talkers, np.random.default_rng(1)))
    assert np.abs(samples - noise(kind, 50_001, talkers, np.random.default_rng(2))).max() > 0.1


def test_spectra_of_the_noises(talkers):
    rng = np.random.default_rng(0)
    frequency, _ = welch(np.zeros(512), SAMPLE_RATE, nperseg=512)
    inner = (frequency > 100) & (frequency < 7500)
    spectra = {kind: log_spectrum(noise(kind, 400_000, talkers, rng))[inner] for kind in NOISES}
    octaves = np.log2(frequency[inner])
    assert np.polyfit(octaves, spectra["white"], 1)[0] == pytest.approx(0, abs=0.1)  # dB an octave
    assert np.polyfit(octaves, spectra["pink"], 1)[0] == pytest.approx(-10 * np.log10(2), abs=0.15)
    speech = log_spectrum(talkers.samples)[inner]
    assert np.std(spectra["speech-shaped"] - speech) < 1.5 < np.std(spectra["white"] - speech)


def test_unknown_noise_is_an_error(talkers):
    with pytest.raises(ValueError, match="no noise 'brown'"):
        noise("brown", 100, talkers, np.random.default_rng(0))


@pytest.mark.parametrize(("rt60", "ratio"), [(0.1, 3.0), (0.4, 12.0)])
def test_reverberation_of_a_click(rt60, ratio):
    click = np.zeros(SAMPLE_RATE)
    click[0] = 1
    response = reverberate(click, rt60, ratio, np.random.default_rng(0))
    assert response[0] == pytest.approx(1)
    tail = response[1:]
    assert 10 * np.log10(np.sum(tail**2)) == pytest.approx(-ratio, abs=0.01)
    # Schroeder's backward integral falls by 60 dB in the reverberation time.
    decay = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1][: round(0.7 * rt60 * SAMPLE_RATE)])
    slope = np.polyfit(np.arange(decay.size) / SAMPLE_RATE, decay, 1)[0]
    assert -60 / slope == pytest.approx(rt60, rel=0.1)
