"""Axes of the dataset and its views: on steps, on words, without special tokens, of selections."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.attribution.estimators import UnitWeights
from xattn.maps import (
    REDUCTIONS,
    build,
    drop_special_tokens,
    expand_to_frames,
    frame_times,
    frames_of_steps,
    on_steps,
    on_words,
    reduce_to_steps,
    upgraded,
    with_cells,
    without_cells,
    words_of,
)

REDUCED = {  # windows (token, frame, band)
    "2d_max": lambda window: window.max(axis=(1, 2)),
    "2d_avg": lambda window: window.mean(axis=(1, 2)),
    "1d_max_1d_avg": lambda window: window.max(axis=2).mean(axis=1),
}


def steps_of(number, width=4, lead=0):
    first = width * np.arange(number) - lead
    return np.stack([first, first + width], axis=1)


def windows_of(saliency, step_frames):
    """The cells of each step; outside the frames, the first or last one repeats."""
    last = saliency.shape[1] - 1
    return [saliency[:, [min(max(frame, 0), last) for frame in range(*step)]] for step in step_frames.tolist()]


def two_tokens(saliency, step_frames, times=None):
    """A dataset of `saliency` (2, time, mel) with uniform attention."""
    steps = len(step_frames)
    arrays = {"input_saliency": saliency, "cross_attention": np.full((1, 1, 2, steps), 1 / steps)}
    times = frame_times(saliency.shape[1]) if times is None else times
    return build(arrays, tokens=["▁a", "▁b"], times=times, step_frames=step_frames, attributes={})


def test_axes_and_coordinates(made):
    maps = made.maps()
    assert maps.input_saliency.dims == ("token", "time", "mel") and maps.features.dims == ("time", "mel")
    assert maps.cross_attention.dims == ("layer", "head", "token", "step")
    assert maps.encoder_saliency.dims == ("token", "step")
    assert [maps[axis].values.tolist() for axis in ("layer", "head")] == [[1, 2], [1, 2, 3]]
    assert [maps[axis].attrs["total"] for axis in ("layer", "head", "time")] == [2, 3, 22]
    assert maps.token.dtype.kind == maps.word.dtype.kind == "U"
    assert maps.word.values.tolist() == ["the", "dog", "sleeps", "sleeps", "</s>"]
    # Frame t is centred 12.5 ms after its start at 10 t ms and drawn 10 ms wide; the last step reaches past frame 21.
    np.testing.assert_allclose(maps.time, 0.0125 + 0.01 * np.arange(22))
    np.testing.assert_allclose(maps.step_start, 0.0075 + 0.04 * np.arange(6))
    np.testing.assert_allclose(maps.step_end, 0.0475 + 0.04 * np.arange(6))
    np.testing.assert_allclose(maps.step, [0.0275, 0.0675, 0.1075, 0.1475, 0.1875, 0.2175])


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 40),
    width=st.integers(1, 16),
    first=st.sampled_from([0.0, 0.0125]),
    data=st.data(),
)
def test_frames_of_steps_inverts_the_stored_edges(frames, width, first, data):
    lead = data.draw(st.integers(0, width // 2))
    step_frames = steps_of(-(-(frames + lead) // width), width, lead)
    maps = two_tokens(np.zeros((2, frames, 3)), step_frames, frame_times(frames, first))
    if frames > 1:
        np.testing.assert_array_equal(frames_of_steps(maps, maps.time.values), step_frames)
        start = data.draw(st.integers(0, frames - 2))
        rest = maps.isel(time=slice(start, None))
        np.testing.assert_array_equal(frames_of_steps(rest, rest.time.values), step_frames - start)
    alone = maps.isel(time=[data.draw(st.integers(0, frames - 1))])
    (covering,) = np.flatnonzero((frames_of_steps(alone, alone.time.values) == [0, 1]).all(axis=1))
    assert maps.step_start[covering] < alone.time.item() < maps.step_end[covering]


@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("frames", [16, 15, 13])
def test_a_reduction_pools_the_frames_of_each_step(frames, lead):
    saliency, step_frames = np.random.default_rng(0).standard_normal((3, frames, 5)), steps_of(4, 4, lead)
    assert set(REDUCED) == set(REDUCTIONS)
    for name, pool in REDUCED.items():
        expected = np.stack([pool(window) for window in windows_of(saliency, step_frames)], axis=1)
        np.testing.assert_allclose(reduce_to_steps(saliency, step_frames, name), expected, rtol=1e-12)
    assert np.array_equal(reduce_to_steps(saliency, step_frames), reduce_to_steps(saliency, step_frames, "2d_max"))
    with pytest.raises(ValueError, match=r"no reduction '3d': choose one of 2d_max, 2d_avg, 1d_max_1d_avg\."):
        reduce_to_steps(saliency, step_frames, "3d")


@pytest.mark.parametrize("frames", [8, 10, 12, 13, 15])
def test_a_first_step_that_starts_before_the_frames_repeats_the_first_one(frames):
    saliency = np.random.default_rng(0).standard_normal((2, frames, 5))
    steps = frames // 6 + 1  # windows of six; the first one lacks three frames and the last one up to three
    maxima, means = np.empty((2, 2, steps))
    for step in range(steps):
        window = [min(max(frame, 0), frames - 1) for frame in range(6 * step - 3, 6 * step + 3)]
        maxima[:, step] = saliency[:, window].max(axis=(1, 2))
        means[:, step] = saliency[:, window].mean(axis=(1, 2))
    np.testing.assert_array_equal(reduce_to_steps(saliency, steps_of(steps, 6, 3)), maxima)
    np.testing.assert_allclose(reduce_to_steps(saliency, steps_of(steps, 6, 3), "2d_avg"), means)


@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize(("lead", "start", "stop"), [(0, 0, 22), (0, 6, 15), (2, 5, 9), (0, 9, 10)])
def test_a_stretch_of_time_is_reduced_to_the_steps_that_cover_it(reduction, lead, start, stop):
    saliency = np.random.default_rng(0).standard_normal((2, 22, 5))
    maps = two_tokens(saliency, steps_of(6, 4, lead))
    found = on_steps(maps.input_saliency.isel(time=slice(start, stop)), maps.cross_attention, reduction)
    covered = [step for step in range(6) if 4 * step - lead < stop and 4 * step - lead + 4 > start]
    assert found.dims == ("token", "step") and np.array_equal(found.step, maps.step[covered])
    assert np.array_equal(found.step_start, maps.step_start[covered])
    windows = windows_of(saliency[:, start:stop], steps_of(6, 4, lead)[covered] - start)
    np.testing.assert_allclose(found, np.stack([REDUCED[reduction](window) for window in windows], axis=1))


def test_an_array_on_steps_is_returned_unchanged(made):
    maps = made.maps()
    saliency = maps.encoder_saliency
    assert on_steps(saliency, maps) is saliency


def test_reduced_arrays_keep_tokens_and_words(made):
    maps = made.maps()
    found = on_steps(maps.input_saliency.isel(token=[1, 3]), maps)
    assert found.token.values.tolist() == ["▁dog", "s"] and found.word.values.tolist() == ["dog", "sleeps"]
    transposed = on_steps(maps.input_saliency.transpose("mel", "time", "token"), maps.cross_attention)
    xr.testing.assert_identical(transposed, on_steps(maps.input_saliency, maps.cross_attention))


def test_steps_expand_over_their_frames_and_bands():
    steps = np.array([[1.0, 2.0, 3.0]])
    cells = expand_to_frames(steps, steps_of(3), frames=10, bands=2)
    assert cells.shape == (1, 10, 2)
    assert cells[0, :, 1].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    cells = expand_to_frames(steps, steps_of(3, lead=2), frames=12, bands=2)
    assert cells[0, :, 1].tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["▁the", "▁dog", "▁sleep", "s", "</s>"], ["the", "dog", "sleeps", "sleeps", "</s>"]),
        (["<s>", "do", "g", "▁", "s", "</s>"], ["<s>", "dog", "dog", "s", "s", "</s>"]),
        (["▁a", "▁a", "<|endoftext|>"], ["a", "a", "<|endoftext|>"]),
        (["</s>"], ["</s>"]),
        (["▁<0xF0>", "<0x9F><0x98>", "<0x80>", "▁a<0xC3>", "<0xA9>"], [*["😀"] * 3, *["aé"] * 2]),
        (["▁a<0xC3>", "▁<0xA9>b", "</s>"], ["a<0xC3>", "<0xA9>b", "</s>"]),  # parts of no character
    ],
)
def test_tokens_are_joined_to_words(tokens, words):
    assert words_of(tokens).tolist() == words


@pytest.mark.parametrize("name", ["cross_attention", "input_saliency", "encoder_saliency"])
def test_words_average_their_tokens(made, name):
    values = made.maps()[name]
    found, axis = on_words(values), values.dims.index("token")
    assert found.dims == tuple("word" if dim == "token" else dim for dim in values.dims)
    assert found.word.values.tolist() == ["the", "dog", "sleeps", "</s>"]
    for number, rows in enumerate(([0], [1], [2, 3], [4])):
        np.testing.assert_allclose(found.isel(word=number), values.values.take(rows, axis).mean(axis), rtol=1e-6)
    other = "time" if name == "input_saliency" else "step"
    assert np.array_equal(found[other], values[other])


def test_selected_tokens_are_averaged_within_their_words_only(made):
    saliency = made.maps(tokens=("▁a", "▁a", "▁dog", "s", "</s>")).encoder_saliency
    assert on_words(saliency).word.values.tolist() == ["a", "a", "dogs", "</s>"]  # a repeated word is two words
    found = on_words(saliency.isel(token=[0, 3, 4]))  # "s" is not a part of "a"
    assert found.word.values.tolist() == ["a", "dogs", "</s>"]
    np.testing.assert_array_equal(found, saliency.isel(token=[0, 3, 4]))


def test_special_tokens_are_dropped(made):
    maps = made.maps(tokens=("<s>", "▁a", "▁b", "</s>"))
    assert drop_special_tokens(maps).token.values.tolist() == ["▁a", "▁b"]
    assert np.array_equal(drop_special_tokens(maps).encoder_saliency, maps.encoder_saliency[1:3])
    assert drop_special_tokens(maps.encoder_saliency).token.values.tolist() == ["▁a", "▁b"]


@pytest.mark.parametrize("lead", [0, 2])
def test_maps_of_earlier_versions_gain_step_edges_and_words(made, lead):
    maps = made.maps()
    steps = maps.sizes["step"]
    old = maps.drop_vars(["word", "step_start", "step_end"]).assign_attrs(subsampling=4, lead=lead)
    old = old.assign_coords(token=maps.token.astype(object))
    new = upgraded(old)
    assert new.token.dtype.kind == "U" and new.word.values.tolist() == maps.word.values.tolist()
    np.testing.assert_array_equal(frames_of_steps(new, new.time.values), steps_of(steps, lead=lead))
    np.testing.assert_allclose(new.step_end - new.step_start, 0.04)
    if not lead:
        del new.attrs["subsampling"], new.attrs["lead"]
        xr.testing.assert_identical(new, maps)
        del old.attrs["lead"]  # the earliest versions did not know it
        np.testing.assert_array_equal(upgraded(old).step_start, maps.step_start)
    assert upgraded(maps) is maps


def test_cells_follow_from_segments(made):
    maps = made.maps()
    assert "input_saliency" not in without_cells(maps)
    xr.testing.assert_identical(with_cells(without_cells(maps))[list(maps)], maps)
    bare = maps.drop_vars(["segmentation", "segment_score", "segment_count"])
    assert without_cells(bare) is bare and with_cells(bare) is bare  # maps of other tools


def test_cells_follow_from_the_weights_of_a_regression(made):
    maps = made.maps().drop_vars(["input_saliency", "segment_score", "segment_count"])
    weights = UnitWeights(np.random.default_rng(0).standard_normal((5, int(maps.segmentation.max()) + 1)))
    found = with_cells(maps.assign({"segment_weight": (("token", "segment"), weights.compact()["segment_weight"])}))
    assert np.array_equal(found.input_saliency, weights.cells(maps.segmentation.values))
