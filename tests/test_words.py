"""Times of words on maps made by hand, the alignment against another implementation, and the files that are written."""

import csv
import itertools
import re

import numpy as np
import pandas as pd
import pysubs2
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from praatio import textgrid
from transformers.models.whisper.generation_whisper import _dynamic_time_warping

import xattn
from xattn.maps import build, drop_special_tokens, frame_times, shifted
from xattn.words import COLUMNS, FORMATS, align, save_words, word_times

HOP = 0.01  # seconds of a frame
TOKENS = ("▁The", "▁dog", "▁sleep", "s", ".", "</s>")
OWNERS = [0] * 3 + [1] * 4 + [2] * 5 + [3] * 2 + [4] * 2 + [5] * 4  # the token of each step
WORDS = pd.DataFrame(
    [("The", 0.0, 0.12, 1.0, 0.0), ("dog,", 0.12, 0.28, 0.5, np.nan), ("sleeps", 0.4, 1.25, 0.25, -0.08)],
    columns=COLUMNS,
)


def made_maps(owners=OWNERS, tokens=TOKENS, width=4, quiet=(), attention=None, saliency=None, first=0):
    """Maps in which each step has most of the attention of its token; steps of `width` frames, quiet ones silent.

    attention: (token, step) instead; saliency: the owners of steps for SM^X; first: the first frame of the first step.
    """
    steps = len(owners)
    if attention is None:
        attention = np.where(np.arange(len(tokens))[:, None] == owners, 1.0, 0.01)
    starts = first + width * np.arange(steps)
    frames = width * steps + first
    level = np.repeat(np.where(np.isin(np.arange(steps), quiet), -5.0, 5.0), width)[-frames:]
    arrays = {"cross_attention": np.broadcast_to(attention, (2, 3, len(tokens), steps))}
    arrays["features"] = np.repeat(level[:, None], 2, axis=1)
    if saliency is not None:
        cells = np.where(np.arange(len(tokens))[:, None] == saliency, 1.0, 0.1)
        arrays["input_saliency"] = np.repeat(np.repeat(cells, width, axis=1)[:, -frames:, None], 2, axis=2)
    return build(
        arrays,
        tokens=tokens,
        times=frame_times(frames, first=HOP / 2, hop=HOP),
        step_frames=np.stack([starts, starts + width], axis=1),
        attributes={"utterance": "made"},
    )


def rows_of(words):
    return [(row.word, round(row.start, 6), round(row.end, 6)) for row in words.itertuples()]


def test_times_of_words_made_by_hand():
    words = word_times(made_maps())
    assert tuple(words.columns) == COLUMNS
    # "sleeps" has two tokens and ends where the period begins; the period and </s> have steps, but no rows.
    assert rows_of(words) == [("The", 0.0, 0.12), ("dog", 0.12, 0.28), ("sleeps.", 0.28, 0.56)]
    np.testing.assert_array_equal(words.confidence, 1.0)
    assert words.saliency_delay.isna().all()


def test_a_word_starts_after_a_tenth_of_its_attention():
    attention = np.full((2, 20), 0.001)
    attention[0, :10] = [0.06, 0.03, 0.21, *[0.1] * 7]  # of a sum of 1, 0.09 has passed after two steps
    attention[1, 10:] = [0.02, 0.18, *[0.1] * 8]
    maps = made_maps(owners=range(20), tokens=("▁a", "▁b"), attention=attention)
    assert rows_of(word_times(maps)) == [("a", 0.08, 0.4), ("b", 0.44, 0.8)]


def test_no_word_starts_or_ends_in_a_pause():
    quiet = [0, 1, 5, 6, 7, 8]
    assert rows_of(word_times(made_maps(quiet=quiet))) == [
        ("The", 0.08, 0.12),
        ("dog", 0.12, 0.2),
        ("sleeps.", 0.36, 0.56),
    ]
    maps = made_maps(quiet=quiet).drop_vars("features")
    assert rows_of(word_times(maps)) == rows_of(word_times(made_maps()))
    # All steps of "The" are quiet: it keeps them.
    assert rows_of(word_times(made_maps(quiet=[0, 1, 2])))[0] == ("The", 0.0, 0.12)


def test_constant_features_hold_no_pauses():
    maps = made_maps()
    assert rows_of(word_times(maps.assign(features=0 * maps.features))) == rows_of(word_times(maps))


def test_default_is_the_mean_of_the_heads_of_the_upper_layers():
    upper, lower = made_maps(), made_maps(owners=[0] * 10 + [1] * 6 + [2, 3, 4, 5])
    # The upper two follow `upper` on average; the last one alone, and all four together, follow `lower`.
    low, high = lower.cross_attention[0], upper.cross_attention[0]
    layers = xr.concat([low, low, 2 * high, low], "layer").assign_coords(layer=[1, 2, 3, 4])
    maps = upper.drop_vars(["cross_attention", "layer"]).assign(cross_attention=layers)
    assert rows_of(word_times(maps)) == rows_of(word_times(upper))
    assert rows_of(word_times(maps.isel(layer=0))) == rows_of(word_times(lower)) != rows_of(word_times(upper))
    assert rows_of(word_times(maps.isel(layer=[0]))) == rows_of(word_times(lower))
    assert rows_of(word_times(maps, maps.cross_attention[0, 0])) == rows_of(word_times(lower))


def test_another_attribution_on_cells_or_on_steps():
    shifted_owners = [0] * 6 + [1] * 4 + [2] * 4 + [3] * 2 + [4] * 2 + [5] * 2
    maps = made_maps(saliency=shifted_owners)
    expected = [("The", 0.0, 0.24), ("dog", 0.24, 0.4), ("sleeps.", 0.4, 0.64)]
    assert rows_of(word_times(maps, maps.input_saliency)) == expected
    steps = maps.input_saliency.max("mel").coarsen(time=4).max().rename(time="step")
    steps = maps.cross_attention[0, 0].copy(data=steps.values)
    assert rows_of(word_times(maps, steps.transpose("step", "token"))) == expected
    negative = steps - 0.5  # weights below 0 do not count
    assert rows_of(word_times(maps, negative)) == expected


def test_saliency_delay_is_the_distance_of_the_peaks():
    peaks = [0, 1, 2, 3, 4, 5]
    attention, saliency = np.full((2, 6, 20), 0.1)
    for token, step in zip(peaks, (1, 5, 9, 12, 15, 18), strict=True):
        attention[token, step] = 1.0
    for token, step in zip(peaks, (1, 8, 7, 12, 15, 18), strict=True):
        saliency[token, step] = 1.0
    maps = made_maps(attention=attention)
    cells = np.repeat(np.repeat(saliency, 4, axis=1)[:, :, None], 2, axis=2)
    maps["input_saliency"] = ("token", "time", "mel"), cells
    # "sleep" has its peaks 0.08 s apart and "s" none, and the first of equal peaks counts.
    np.testing.assert_allclose(word_times(maps).saliency_delay, [0.0, 0.12, -0.08], atol=1e-9)
    np.testing.assert_allclose(word_times(maps, maps.input_saliency).saliency_delay, 0.0, atol=1e-9)


def test_confidence_compares_a_token_with_its_highest_weight_elsewhere():
    attention = np.where(np.arange(3)[:, None] == [0] * 4 + [1] * 4 + [2] * 4, 0.6, 0.2)
    attention[:, 11] = [5.0, 0.2, 0.2]  # far from the steps of "a"
    maps = made_maps(owners=range(12), tokens=("▁a", "▁b", "▁c"), attention=attention)
    words = word_times(maps)
    assert rows_of(words)[0] == ("a", 0.0, 0.16)
    # Standardised over three tokens, one high weight is 2 / sqrt(3), however high it is.
    np.testing.assert_allclose(words.confidence, 1.0)
    attention[:, :4] = np.array([[0.3], [0.2], [0.25]])  # standardised, "a" has 1 here and 2 / sqrt(3) at step 11
    words = word_times(maps, maps.cross_attention[0, 0].copy(data=attention))
    np.testing.assert_allclose(words.confidence[0], np.sqrt(3) / 2)


def test_attention_without_any_peak_has_no_confidence():
    maps = made_maps(attention=np.full((6, 20), 0.05))
    np.testing.assert_array_equal(word_times(maps).confidence, 0.0)


def test_a_single_token_has_all_steps():
    maps = made_maps(owners=[0] * 10, tokens=("▁yes",))
    words = word_times(maps)
    assert rows_of(words) == [("yes", 0.0, 0.4)]
    assert words.confidence[0] == 0  # nothing to compare with


def test_punctuation_and_special_tokens():
    tokens = ("▁Well", ",", "▁—", "▁it", "'", "s", "▁…", "<|endoftext|>")
    owners = np.repeat(np.arange(8), 2)
    words = word_times(made_maps(owners=owners, tokens=tokens))
    assert rows_of(words) == [("Well,", 0.0, 0.08), ("it's", 0.24, 0.48)]
    words = word_times(made_maps(owners=[0, 0, 1, 1], tokens=("▁—", "</s>")))
    assert len(words) == 0 and tuple(words.columns) == COLUMNS


def test_selected_tokens_and_stretches():
    maps = made_maps(saliency=OWNERS)
    everything = rows_of(word_times(maps))
    assert rows_of(word_times(drop_special_tokens(maps)))[:2] == everything[:2]
    # Without the middle of the output, the neighbours share its steps, and parts of two words stay apart.
    words = word_times(maps.isel(token=[0, 3, 5]))
    assert words.word.tolist() == ["The", "sleeps."]
    stretch = maps.isel(token=slice(1, 4), step=slice(3, 14), time=slice(12, 56))
    assert rows_of(word_times(stretch)) == [("dog", 0.12, 0.28), ("sleeps.", 0.28, 0.56)]
    # Frames for some of the steps: the others are not quiet.
    assert rows_of(word_times(maps.isel(time=slice(20, 40)))) == everything


def test_maps_of_a_part_have_the_times_of_the_whole_recording():
    maps = made_maps(saliency=OWNERS, quiet=[0, 5])
    moved = word_times(shifted(maps, 12.5))
    words = word_times(maps)
    np.testing.assert_allclose(moved[["start", "end"]], words[["start", "end"]] + 12.5, atol=1e-6)
    pd.testing.assert_frame_equal(moved.drop(columns=["start", "end"]), words.drop(columns=["start", "end"]))


def test_times_stay_within_the_recording():
    # The first step begins two frames before the recording.
    words = word_times(made_maps(first=-2))
    assert rows_of(words)[:2] == [("The", 0.0, 0.1), ("dog", 0.1, 0.26)]
    maps = xattn.word_times(made_maps(owners=[0, 1], tokens=("▁a", "▁b")).isel(time=slice(0, 8)))
    assert maps.end.max() == 0.08


def test_more_tokens_than_steps():
    maps = made_maps(owners=[0, 1], tokens=("▁a", "▁b", "▁c", "</s>"))
    words = word_times(maps)
    assert words.word.tolist() == ["a", "b", "c"]
    assert (words.end > words.start).all() and (words.start.values[1:] >= words.end.values[:-1]).all()
    assert words.end.max() < 0.08  # </s> has a share, too


@settings(deadline=None)
@given(
    scores=st.tuples(st.integers(1, 7), st.integers(0, 9)).flatmap(
        lambda sizes: arrays(np.int64, (sizes[0], sizes[0] + sizes[1]), elements=st.integers(-9, 9))
    )
)
def test_alignment_agrees_with_another_implementation(scores):
    tokens, steps = scores.shape
    # Its paths can also stay at a step, which takes one more cell: a high cost of cells rules that out.
    rows, columns = _dynamic_time_warping(1000 - scores.astype(float))
    assert columns.tolist() == [*range(steps)]
    owner = align(scores)
    assert owner[0] == 0 and owner[-1] == tokens - 1 and set(np.diff(owner)) <= {0, 1}
    assert scores[owner, np.arange(steps)].sum() == scores[rows, columns].sum()


@settings(deadline=None)
@given(arrays(float, (3, 7), elements=st.floats(-3, 3)))
def test_alignment_has_the_highest_sum_of_all(scores):
    bounds = itertools.combinations(range(1, 7), 2)
    best = max(scores[0, :a].sum() + scores[1, a:b].sum() + scores[2, b:].sum() for a, b in bounds)
    assert scores[align(scores), np.arange(7)].sum() == pytest.approx(best)


@settings(deadline=None)
@given(data=st.data())
def test_words_are_in_order_and_within_the_recording(data):
    steps = data.draw(st.integers(1, 12))
    names = st.sampled_from(["▁a", "b", ".", "▁—", "▁12", "</s>"])
    tokens = data.draw(st.lists(names, min_size=1, max_size=9))
    attention = data.draw(arrays(float, (len(tokens), steps), elements=st.floats(0, 1, allow_subnormal=False)))
    quiet = data.draw(st.lists(st.integers(0, steps - 1)))
    first = data.draw(st.integers(-3, 0))
    words = word_times(made_maps(owners=range(steps), tokens=tokens, attention=attention, quiet=quiet, first=first))
    duration = HOP * (4 * steps + first)
    assert (words.start < words.end).all() and (words.start.values[1:] >= words.end.values[:-1]).all()
    assert (words.start >= 0).all() and (words.end <= duration + 1e-6).all()
    assert words.confidence.between(0, 1).all()


def test_maps_of_a_model_have_a_row_for_each_word(model, audio):
    occlusion = xattn.Occlusion(input_masks=8, encoder_masks=8, seconds=None)
    maps = xattn.explain(model, audio, rate=16_000, text="the dog sleeps", occlusion=occlusion, progress=False)
    words = xattn.word_times(maps)
    assert words.word.tolist() == ["the", "dog", "sleeps"]
    assert words.saliency_delay.notna().all()
    assert words.start.min() >= 0 and words.end.max() <= len(audio) / 16_000 + 0.04


def test_maps_without_attention():
    maps = made_maps()
    with pytest.raises(ValueError, match=r"^The maps hold no cross_attention: give the attribution to use\.$"):
        word_times(maps.drop_vars("cross_attention"))
    assert len(word_times(maps.drop_vars("cross_attention"), maps.cross_attention)) == 3
    with pytest.raises(ValueError, match=r"^The attribution and the maps have different tokens: give an"):
        word_times(maps, maps.cross_attention.isel(token=slice(3)))


def test_words_are_written_as_a_table(tmp_path):
    save_words(WORDS, tmp_path / "new" / "words.csv")
    with open(tmp_path / "new" / "words.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert rows == [
        ["The", "0.000", "0.120", "1.000", "0.000"],
        ["dog,", "0.120", "0.280", "0.500", ""],
        ["sleeps", "0.400", "1.250", "0.250", "-0.080"],
    ]


@pytest.mark.parametrize(("name", "mark"), [("words.srt", ","), ("words.VTT", ".")])
def test_words_are_written_as_subtitles(tmp_path, name, mark):
    path = tmp_path / name
    save_words(WORDS, path)
    read = pysubs2.load(str(path), format_=path.suffix[1:].lower())
    assert [(each.start, each.end, each.text) for each in read] == [
        *((0, 120, "The"), (120, 280, "dog,"), (400, 1250, "sleeps")),
    ]
    text = path.read_text(encoding="utf-8")
    assert f"00:00:00{mark}400 --> 00:00:01{mark}250\nsleeps" in text
    assert text.startswith("WEBVTT") == (mark == ".")


def test_words_with_marks_of_the_formats_survive(tmp_path):
    marked = WORDS.assign(word=["{x}", "a<b>&c", 'è"'])
    for name in FORMATS:
        save_words(marked, tmp_path / f"words{name}")
    assert re.findall(r"\n(.+)\n\n", (tmp_path / "words.srt").read_text("utf-8") + "\n\n") == marked.word.tolist()
    vtt = (tmp_path / "words.vtt").read_text(encoding="utf-8")
    assert "\na&lt;b&gt;&amp;c\n" in vtt and "\n{x}\n" in vtt
    grid = textgrid.openTextgrid(str(tmp_path / "words.TextGrid"), includeEmptyIntervals=False)
    assert [each.label for each in grid.getTier("words").entries] == marked.word.tolist()
    assert pd.read_csv(tmp_path / "words.csv").word.tolist() == marked.word.tolist()


def test_words_are_written_for_praat(tmp_path):
    save_words(WORDS, tmp_path / "words.TextGrid")
    grid = textgrid.openTextgrid(str(tmp_path / "words.TextGrid"), includeEmptyIntervals=True)
    assert grid.tierNames == ("words",)
    assert [tuple(each) for each in grid.getTier("words").entries] == [
        *((0.0, 0.12, "The"), (0.12, 0.28, "dog,"), (0.28, 0.4, ""), (0.4, 1.25, "sleeps")),
    ]
    assert (tmp_path / "words.TextGrid").read_text(encoding="utf-8").startswith('File type = "ooTextFile"')


def test_intervals_for_praat_end_with_the_recording(made, tmp_path):
    maps = made.maps(tokens=("▁a", "▁b", "</s>"), frames=40)
    save_words(word_times(maps), tmp_path / "words.TextGrid")
    last = textgrid.openTextgrid(str(tmp_path / "words.TextGrid"), includeEmptyIntervals=True).maxTimestamp
    assert last == pytest.approx(float(maps.step_end[-1]), abs=0.006)
    assert last >= word_times(maps).end.max()


@pytest.mark.parametrize("name", FORMATS)
def test_files_without_words(tmp_path, name):
    save_words(WORDS[:0], tmp_path / f"words{name}")
    assert "The" not in (tmp_path / f"words{name}").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_replaced_whole_or_not_at_all(tmp_path, name, monkeypatch):
    path = tmp_path / f"words{name}"
    path.write_text("old", encoding="utf-8")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("xattn.files.os.replace", fail)
        with pytest.raises(OSError, match="could not be written.*make room"):
            save_words(WORDS, path)
    assert path.read_text(encoding="utf-8") == "old" and [*tmp_path.iterdir()] == [path]
    save_words(WORDS, path)
    assert "sleeps" in path.read_text(encoding="utf-8") and [*tmp_path.iterdir()] == [path]


def test_what_is_not_a_table_of_words_is_refused(made, tmp_path):
    for other in (made.maps(tokens=("▁a", "▁b", "</s>"), frames=40), WORDS[["word"]]):
        with pytest.raises(ValueError, match=r"^There is no table of words to save: give what xattn\.word_times"):
            save_words(other, tmp_path / "words.srt")


def test_other_extensions(tmp_path):
    for name in ("words.txt", "words"):
        with pytest.raises(
            ValueError, match=rf"^Words cannot be written to .*{name}: .* in \.csv, \.srt, \.vtt, \.TextGrid\.$"
        ):
            save_words(WORDS, tmp_path / name)
    assert not [*tmp_path.iterdir()]
