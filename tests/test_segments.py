"""Superpixels and windows of time: sizes, shapes and names of the partitions of a spectrogram."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xattn.attribution.segments import PARTITIONS, partition, same_segment, segment_numbers, slic_pyramid
from xattn.models.errors import NothingToExplain


def noise(frames, seed=0):
    return np.random.default_rng(seed).standard_normal((frames, 80)).astype(np.float32)


@pytest.mark.parametrize("frames", [1, 5, 61, 300, 800])
def test_every_level_numbers_every_cell_without_gaps(frames):
    levels = slic_pyramid(noise(frames))
    assert levels.shape == (3, frames, 80) and levels.dtype == np.int32
    for level in levels:
        assert np.array_equal(np.unique(level), np.arange(level.max() + 1))
        assert level.max() >= frames // 5


def test_the_number_of_segments_grows_up_to_the_threshold():
    assert segment_numbers(100) == [400, 500, 600]  # one second (paper, section 4)
    assert segment_numbers(500) == [2000, 2500, 3000]
    assert segment_numbers(750) == segment_numbers(751) == segment_numbers(3000) == [3000, 3750, 4500]
    assert segment_numbers(1) == [4, 5, 6]


@pytest.mark.parametrize("frames", [5, 300, 750])
def test_the_first_two_levels_are_equal_up_to_the_threshold(frames):
    levels = slic_pyramid(noise(frames))
    assert np.array_equal(levels[0], levels[1])
    assert not np.array_equal(levels[0], levels[2])


@pytest.mark.parametrize("frames", [61, 300, 750, 900])
def test_levels_of_the_spread_superpixels_differ(frames):
    found = [level.max() + 1 for level in slic_pyramid(noise(frames), pyramid="spread")]
    assert found[0] > 1.8 * found[1] > 2.7 * found[2]


def test_the_first_two_levels_of_longer_inputs_differ():
    levels = slic_pyramid(noise(900))
    assert not np.array_equal(levels[0], levels[1])
    assert levels[1].max() > levels[0].max()


def test_segments_follow_edges_in_the_features():
    features = noise(60) * 0.01
    features[23:] += 5  # not a multiple of the grid step
    for level in slic_pyramid(features):
        assert not set(np.unique(level[:23])) & set(np.unique(level[23:]))


def test_sigma_changes_the_segments():
    assert not np.array_equal(slic_pyramid(noise(60)), slic_pyramid(noise(60), sigma=1.0))


def test_a_partition_is_chosen_by_its_name():
    features = noise(61)
    assert PARTITIONS == ("superpixels", "spread", "windows")
    found = {kind: partition(features, kind, 0.01) for kind in PARTITIONS}
    assert np.array_equal(found["superpixels"], slic_pyramid(features))
    assert np.array_equal(found["spread"], slic_pyramid(features, pyramid="spread"))
    for first, second in itertools.combinations(found.values(), 2):
        assert first.shape == second.shape == (3, 61, 80) and not np.array_equal(first, second)


@given(frames=st.integers(1, 200), bands=st.integers(1, 5), milliseconds=st.sampled_from([5, 10, 12.5, 15, 16, 20, 80]))
def test_windows_are_0_1_0_2_and_0_4_seconds_of_all_bands(frames, bands, milliseconds):
    levels = partition(np.zeros((frames, bands), dtype=np.float32), "windows", milliseconds / 1000)
    assert levels.shape == (3, frames, bands) and levels.dtype == np.int32
    for level, width in zip(levels, (100, 200, 400), strict=True):
        assert (level == level[:, :1]).all()  # the same for all bands
        numbers = level[:, 0]
        assert numbers[0] == 0 and set(np.diff(numbers)) <= {0, 1}  # every frame has a window without gaps in time
        *whole, last = np.bincount(numbers)
        per_window = round(width / milliseconds)
        assert set(whole) <= {per_window} and 1 <= last <= per_window


def test_windows_of_known_lengths():
    levels = partition(noise(61), "windows", 0.01)
    assert [np.bincount(level[:, 3]).tolist() for level in levels] == [[10] * 6 + [1], [20] * 3 + [1], [40, 21]]
    levels = partition(noise(61), "windows", 0.02)  # half as many frames a second
    assert [np.bincount(level[:, 3]).tolist() for level in levels] == [[5] * 12 + [1], [10] * 6 + [1], [20] * 3 + [1]]
    levels = partition(noise(3), "windows", 0.5)  # frames longer than every window
    assert levels[:, :, 0].tolist() == [[0, 1, 2]] * 3


def test_a_constant_spectrogram_has_windows():
    assert partition(np.full((50, 80), 0.3, dtype=np.float32), "windows", 0.01).shape == (3, 50, 80)
    for kind in ("superpixels", "spread"):
        with pytest.raises(NothingToExplain, match="same value in every cell: give a recording that is longer or not"):
            partition(np.full((50, 80), 0.3, dtype=np.float32), kind, 0.01)


def test_neighbours_in_the_same_segment_are_found():
    labels = np.array([[0, 0, 1], [0, 2, 1]])
    assert same_segment(labels).tolist() == [True, False, True, True, False, False, False]
