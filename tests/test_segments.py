import numpy as np
import pytest

from xattn.attribution.segments import same_segment, segment_numbers, slic_pyramid


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
def test_levels_of_the_spread_pyramid_differ(frames):
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


def test_a_constant_spectrogram_raises():
    with pytest.raises(ValueError, match="same value in every cell: give a recording that is not silent"):
        slic_pyramid(np.full((50, 80), 0.3, dtype=np.float32))


def test_neighbours_in_the_same_segment_are_found():
    labels = np.array([[0, 0, 1], [0, 2, 1]])
    assert same_segment(labels).tolist() == [True, False, True, True, False, False, False]
