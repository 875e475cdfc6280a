"""Partitions of a spectrogram at several levels: superpixels, which SPES hides, or windows of time.

SPES (Fucci et al., arXiv 2411.01710) uses a Morphological Fragmental Perturbation Pyramid: SLIC segments at three
granularities. At the published settings and for 5 to 750 frames of 80 bands, SLIC's grid step rounds to the same four
cells at all three: the first two levels are identical, and the third differs only in where its grid starts. The
partition "spread" asks for steps of four, six and eight cells instead.

"windows" are windows of time over all bands, at three lengths. They need far fewer perturbations than superpixels, but
they are coarse in time and say nothing about frequency.
"""

import numpy as np
from skimage.segmentation import slic

from xattn.models.errors import NothingToExplain

PARTITIONS = ("superpixels", "spread", "windows")
# Segments of a reference input at each granularity.
PYRAMIDS = {"superpixels": (2000, 2500, 3000), "spread": (2500, 1111, 625)}
WINDOWS = (0.1, 0.2, 0.4)  # seconds
REFERENCE_FRAMES = 500  # frames of that input, hence 400, 500 and 600 segments a second (paper, section 4)
THRESHOLD_FRAMES = 750  # above 7.5 s the number of segments stops growing (paper, section 4)
COMPACTNESS = 0.1
SIGMA = 0.0  # the reference code defaults to 1; the paper and its released configurations use 0


def partition(features: np.ndarray, kind: str, frame_seconds: float) -> np.ndarray:
    """Divide a spectrogram (time, mel) into the units of one of PARTITIONS.

    Returns:
        int32 (level, time, mel): the unit of each cell at each level, numbered from 0 without gaps.
    """
    if kind == "windows":
        return time_windows(len(features), features.shape[1], frame_seconds)
    return slic_pyramid(features, pyramid=kind)


def time_windows(frames: int, bands: int, frame_seconds: float) -> np.ndarray:
    """Windows of time over all bands, one level for each of WINDOWS; see `partition`."""
    widths = [max(1, round(seconds / frame_seconds)) for seconds in WINDOWS]
    labels = np.stack([np.arange(frames, dtype=np.int32) // width for width in widths])  # (level, time)
    return np.broadcast_to(labels[..., None], (*labels.shape, bands)).copy()


def segment_numbers(frames: int, pyramid: str = "superpixels") -> list[int]:
    """Number of segments to ask SLIC for at each granularity of one of PYRAMIDS, for an input of `frames` frames."""
    return [max(1, round(number * min(frames, THRESHOLD_FRAMES) / REFERENCE_FRAMES)) for number in PYRAMIDS[pyramid]]


def same_segment(labels: np.ndarray) -> np.ndarray:
    """Whether neighbouring cells of a segmentation (time, mel) share a segment: bool, pairs in time, then in mel."""
    return np.concatenate([(labels[1:] == labels[:-1]).ravel(), (labels[:, 1:] == labels[:, :-1]).ravel()])


def slic_pyramid(features: np.ndarray, sigma: float = SIGMA, pyramid: str = "superpixels") -> np.ndarray:
    """Segment a spectrogram at every granularity.

    Args:
        features: float32 (time, mel), the model's input (the reference segments the normalised features).
        sigma: width of the Gaussian smoothing before SLIC, in cells.
        pyramid: a name in PYRAMIDS.

    Returns:
        int32 (level, time, mel): the segment of each cell at each level, numbered from 0 without gaps.

    Raises:
        NothingToExplain: the spectrogram is constant and therefore has no segments.
    """
    low, high = features.min(), features.max()
    if not high > low:
        raise NothingToExplain(
            "The spectrogram has the same value in every cell: give a recording that is longer or not silent."
        )
    # In float64 some labels would differ from the reference's (golden fixture `long`).
    scaled = (features.astype(np.float32) - low) / (high - low)
    levels = []
    for number in segment_numbers(len(features), pyramid):
        labels = slic(scaled, n_segments=number, compactness=COMPACTNESS, sigma=sigma, channel_axis=None, start_label=1)
        found = np.unique(labels)
        if found[0] != 1 or found[-1] != len(found):
            raise RuntimeError(
                "This version of scikit-image numbers SLIC's segments differently: install the one in requirements.txt."
            )
        levels.append(labels.astype(np.int32) - 1)
    return np.stack(levels)
