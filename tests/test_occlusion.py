import itertools
import math

import numpy as np
import pytest
import torch
from conftest import Clock, GivenMasks, listed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy, mannwhitneyu

from xattn.attribution import occlusion
from xattn.attribution.estimators import UnitScores
from xattn.attribution.occlusion import Masks, Partition, divergence_from, kl_divergence, occlude

GRID = (24, 16)


def blocks(frames, mels):
    """Labels from 0 of a grid that is cut into blocks of frames x mels cells."""
    rows, columns = np.indices(GRID)
    return rows // frames * (GRID[1] // mels) + columns // mels


LEVELS = np.stack([blocks(2, 2), blocks(4, 4)])


def spes(levels, masks, scores):
    """The published definition, cell by cell: the mean score of the masks that hid a cell."""
    total, times = np.zeros((scores.shape[1], *levels.shape[1:])), np.zeros(levels.shape[1:])
    for (level, hidden), score in zip(masks, scores, strict=True):
        occluded = hidden[levels[level]].astype(float)
        total += np.multiply.outer(score, occluded)
        times += occluded
    with np.errstate(invalid="ignore"):
        return np.where(times > 0, total / times, 0.0)


def linear_score(shape, tokens=3, seed=0):
    """A float64 score (B, tokens) to which every hidden cell adds its own random weight."""
    weights = torch.from_numpy(np.random.default_rng(seed).standard_normal((math.prod(shape), tokens)))
    return lambda keep: (1 - keep.double()).flatten(1) @ weights


def auc(values, truth):
    """Area under the ROC curve: the probability that a planted cell exceeds another one."""
    inside, outside = values[truth], values[~truth]
    return mannwhitneyu(inside, outside).statistic / (inside.size * outside.size)


def planted_model(truths):
    """Scores of a model whose first log-probability, for token i, grows with the visible share of planted cells i."""
    planted = torch.from_numpy(np.stack([truth.reshape(-1) for truth in truths])).double()

    def log_p(keep):
        evidence = 4 * keep.double().flatten(1) @ (planted / planted.sum(1, keepdim=True)).T
        return torch.stack([evidence, torch.zeros_like(evidence), torch.ones_like(evidence)], -1).log_softmax(-1)

    original = log_p(torch.ones(1, planted.shape[1]))
    return lambda keep: kl_divergence(original, log_p(keep))


def explained(score, masks, batch_size=64):
    return UnitScores.of(occlude(score, masks, batch_size=batch_size), masks)


def test_planted_cells_of_a_spectrogram_are_found():
    truths = [np.isin(LEVELS[1], cells) for cells in ([5], [0, 23])]
    masks = Masks(Partition.of(LEVELS), 1500, 0.5, seed=0, name="planted")
    cells = explained(planted_model(truths), masks).cells(masks.partition.labels)
    assert [auc(token, truth) for token, truth in zip(cells, truths, strict=True)] == [1.0, 1.0]
    assert auc(cells[0], truths[1]) < 0.9  # a map finds only the cells of its own token


def test_planted_steps_are_found():
    truths = [np.isin(np.arange(15), steps) for steps in ([3, 4, 9], [0], [14, 2])]
    masks = Masks(Partition.of(np.arange(15)[None]), 1500, 0.7, seed=0, name="planted")
    cells = explained(planted_model(truths), masks).cells(masks.partition.labels)
    assert [auc(token, truth) for token, truth in zip(cells, truths, strict=True)] == [1.0, 1.0, 1.0]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_engine_follows_the_published_definition(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=2, max_side=6))
    raw = data.draw(st.lists(hnp.arrays(int, shape, elements=st.integers(0, 8)), min_size=1, max_size=3))
    levels = np.stack([np.unique(labels, return_inverse=True)[1].reshape(shape) for labels in raw])
    p, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 9))
    masks = Masks(Partition.of(levels), data.draw(st.integers(1, 12)), p, seed, "u")
    score = linear_score(shape)
    keep = torch.from_numpy(np.stack([~hidden[levels[level]] for level, hidden in listed(masks)]))
    expected = spes(levels, listed(masks), score(keep).float().numpy())
    scores = explained(score, masks, batch_size=data.draw(st.integers(1, 13)))
    np.testing.assert_allclose(scores.cells(masks.partition.labels), expected, rtol=1e-6, atol=1e-6)


def test_masks_can_come_in_any_order_of_levels():
    rng = np.random.default_rng(0)
    partition = Partition.of(LEVELS)
    rows = [(level, rng.random((96, 24)[level]) < 0.5) for level in rng.integers(0, 2, 1500)]
    scores = rng.random((1500, 2)).astype(np.float32)
    cells = UnitScores.of(scores, GivenMasks(partition, rows)).cells(partition.labels)
    np.testing.assert_allclose(cells, spes(LEVELS, rows, scores), rtol=1e-10)


def test_the_batch_size_changes_only_rounding():
    masks = Masks(Partition.of(LEVELS), 150, 0.5, 0, "u")
    runs = [occlude(linear_score(GRID), masks, batch_size=size) for size in (1, 7, 64)]
    assert runs[0].shape == (150, 3) and np.abs(runs[0]).max() > 1
    for run in runs[1:]:
        np.testing.assert_allclose(run, runs[0], rtol=1e-6, atol=1e-6)


def out_of_memory(where):
    if where == "numpy":
        raise MemoryError
    if where == "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    torch.empty(2**62, dtype=torch.uint8)  # torch's own error


@pytest.mark.parametrize("where", ["numpy", "cuda", "cpu"])
def test_batches_are_halved_until_they_fit_in_memory(where):
    masks, score, sizes = Masks(Partition.of(LEVELS), 150, 0.5, 0, "u"), linear_score(GRID), []

    def limited(keep):
        sizes.append(len(keep))
        return score(keep) if len(keep) <= 7 else out_of_memory(where)

    found = occlude(limited, masks, batch_size=60, done=occlude(score, masks, batch_size=7)[:33])
    np.testing.assert_allclose(found, occlude(score, masks, batch_size=7), rtol=1e-6, atol=1e-6)
    assert sizes == [60, 30, 15, *[7] * 16, 5]


def test_a_single_perturbation_that_does_not_fit_in_memory_raises():
    masks = Masks(Partition.of(LEVELS), 5, 0.5, 0, "u")
    with pytest.raises(MemoryError, match=r"to score a single perturbation: use a shorter recording, .*more memory\.$"):
        occlude(lambda keep: out_of_memory("cpu"), masks, batch_size=4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # other errors pass through
        occlude(lambda keep: keep[0] @ keep[0], masks, batch_size=4)


def test_nothing_is_hidden_at_p_0():
    masks = Masks(Partition.of(LEVELS), 20, 0.0, 0, "u")
    seen = []

    def score(keep):
        seen.append(keep)
        return torch.ones(len(keep), 2)

    scores = explained(score, masks, batch_size=8)
    assert torch.cat(seen).shape == (20, *GRID) and torch.cat(seen).all()
    assert not scores.counts.any() and not scores.cells(masks.partition.labels).any()


def test_everything_is_hidden_at_p_1_and_almost_everything_at_p_0_999():
    masks = Masks(Partition.of(LEVELS), 20, 1.0, 0, "u")
    assert all(hidden.all() for _, hidden in listed(masks))
    scores = explained(lambda keep: keep.flatten(1).sum(1, keepdim=True) + 5.0, masks, batch_size=8)
    assert (scores.counts == 10).all()
    assert (scores.cells(masks.partition.labels) == 5.0).all()
    nearly = np.concatenate([hidden for _, hidden in listed(Masks(masks.partition, 500, 0.999, 0, "u"))])
    assert 0.998 < nearly.mean() < 1


@pytest.mark.parametrize("p", [0.2, 0.5, 0.7])
def test_the_share_of_hidden_units_is_p(p):
    levels, hidden = zip(*listed(Masks(Partition.of(LEVELS), 400, p, 3, "u")), strict=True)
    assert levels == (0, 1) * 200
    assert {len(units) for units in hidden[::2]} == {96} and {len(units) for units in hidden[1::2]} == {24}
    units = np.concatenate(hidden)
    assert abs(units.sum() - p * units.size) < 4 * math.sqrt(p * (1 - p) * units.size)
    # Neighbouring perturbations are independent, so they agree no more often than by chance.
    agreement = np.mean([np.mean(a == b) for a, b in zip(hidden[:-2:2], hidden[2::2], strict=True)])
    chance = p**2 + (1 - p) ** 2
    assert abs(agreement - chance) < 4 * math.sqrt(chance * (1 - chance) / (199 * 96)) * 2


def test_perturbations_share_no_sequence_of_random_numbers():
    masks = [hidden for _, hidden in listed(Masks(Partition.of(np.arange(300)[None]), 6, 0.5, 0, "u"))]
    for first, second in itertools.combinations(masks, 2):
        for shift in range(1, 60):
            assert 0.3 < np.mean(first[shift:] == second[:-shift]) < 0.7


def test_masks_depend_only_on_seed_name_and_index():
    # The first level has 150 units and the second 23, so rows of the random stream do not end on round numbers.
    partition = Partition.of(np.stack([np.arange(150), np.arange(150) % 23]))

    def drawn(number, seed=0, name="u"):
        return [(int(level), hidden.tolist()) for level, hidden in listed(Masks(partition, number, 0.5, seed, name))]

    assert drawn(25)[:10] == drawn(10)
    assert len({str(mask) for mask in drawn(25)}) == 25
    for other in (drawn(25, seed=1), drawn(25, name="v"), drawn(25, seed=-1)):
        assert all(a != b for a, b in zip(drawn(25), other, strict=True))
    assert drawn(3, seed=1, name="2/u") != drawn(3, seed=1, name="1/u")


@given(st.lists(st.integers(0, 40), min_size=2, max_size=4).map(sorted))
def test_any_range_of_masks_can_be_drawn_alone(edges):
    masks = Masks(Partition.of(LEVELS), 40, 0.5, 0, "u")
    whole = masks.draw(edges[0], edges[-1])
    parts = [masks.draw(start, stop) for start, stop in itertools.pairwise(edges)]
    for all_at_once, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(all_at_once, np.concatenate(pieces))


def test_a_score_that_is_not_finite_raises():
    masks = Masks(Partition.of(LEVELS), 5, 0.5, 0, "u")
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="not finite: check its weights and the recording"):
            occlude(lambda keep, bad=bad: torch.full((len(keep), 2), bad), masks, batch_size=2)


def test_0_perturbations_raise():
    with pytest.raises(ValueError, match=r"The number of masks is 0: set it to 1 or more\."):
        occlude(linear_score(GRID), Masks(Partition.of(LEVELS), 0, 0.5, 0, "u"), batch_size=2)


def test_unit_numbers_continue_from_level_to_level():
    partition = Partition.of(np.array([[[0, 0], [1, 1]], [[0, 1], [2, 0]]]))
    assert partition.labels.tolist() == [[[0, 0], [1, 1]], [[2, 3], [4, 2]]]
    assert partition.bounds.tolist() == [0, 2, 5]
    assert partition.units == 5


def test_a_cell_that_was_never_hidden_gets_0():
    scores = UnitScores(np.array([[6.0, 0.0, 2.0, 0.0]]), np.array([2, 0, 1, 0]))
    labels = np.array([[0, 0, 1], [2, 3, 3]])
    assert scores.cells(labels).tolist() == [[8 / 3, 3.0, 0.0]]


@given(hnp.arrays(float, st.tuples(st.just(2), st.integers(2, 12)), elements=st.floats(-40, 40)))
def test_kl_divergence_agrees_with_scipy(logits):
    log_p, log_q = log_softmax(logits, axis=-1)
    result = kl_divergence(torch.from_numpy(log_p), torch.from_numpy(log_q)).item()
    assert result == pytest.approx(rel_entr(np.exp(log_p), np.exp(log_q)).sum(), rel=1e-9, abs=1e-12)
    assert result > -1e-12
    assert kl_divergence(torch.from_numpy(log_p), torch.from_numpy(log_p)).item() == 0


def test_divergences_from_a_fixed_distribution_are_kl_divergences():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(50), 3), rng.dirichlet(np.ones(50), (4, 3))
    log_p, log_q = torch.from_numpy(p).log(), torch.from_numpy(q).log()
    np.testing.assert_allclose(divergence_from(log_p)(log_q), kl_divergence(log_p, log_q), rtol=1e-10)
    near = log_p.float() + 1e-3 * torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    near = near.log_softmax(-1)
    exact = kl_divergence(log_p.float().double(), near.double())
    np.testing.assert_allclose(divergence_from(log_p.float())(near), exact, rtol=2e-2, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):  # it rounds the model's passes, not their scores
        np.testing.assert_allclose(divergence_from(log_p.float())(near), exact, rtol=2e-2, atol=1e-7)
    log_p[0, 0] = log_q[0, 0, 0] = log_q[1, 0, 0] = -math.inf
    assert torch.equal(divergence_from(log_p)(log_q), kl_divergence(log_p, log_q))


def test_kl_divergence_is_in_nats_over_the_last_axis():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(7), (3, 4)), rng.dirichlet(np.ones(7), (3, 4))
    result = kl_divergence(torch.from_numpy(p).log(), torch.from_numpy(q).log()).numpy()
    np.testing.assert_allclose(result, entropy(p, q, axis=-1), rtol=1e-12)
    certain, even = torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()
    assert kl_divergence(certain, even).item() == pytest.approx(math.log(2))


def test_kl_divergence_stays_finite_at_zero_probabilities():
    def kl(p, q):
        return kl_divergence(torch.tensor(p).log(), torch.tensor(q).log()).item()

    tiny = math.log(np.finfo(np.float32).tiny)
    assert kl([0.5, 0.5, 0.0], [0.25, 0.75, 0.0]) == pytest.approx(entropy([0.5, 0.5], [0.25, 0.75]))
    assert kl([0.5, 0.5, 0.0], [0.25, 0.25, 0.5]) == pytest.approx(math.log(2))
    assert kl([0.5, 0.5], [1.0, 0.0]) == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - tiny))
    # A probability that is too small for float32 is not zero: its logarithm counts.
    log_q = torch.tensor([0.0, -200.0])
    assert kl_divergence(torch.tensor([0.5, 0.5]).log(), log_q).item() == pytest.approx(math.log(0.5) + 100)


def test_occlusion_stops_when_there_are_enough_perturbations_whatever_the_batch_size():
    masks, score = Masks(Partition.of(LEVELS), 1000, 0.5, 0, "stop"), linear_score(GRID)
    everything, asked = occlude(score, masks, batch_size=64), []

    def enough(scores):
        asked.append(len(scores))
        return len(scores) >= 300

    found = occlude(score, masks, batch_size=64, enough=enough)
    assert asked == [60, 90, 135, 202, 303] and len(found) == 303
    np.testing.assert_allclose(found, everything[:303], rtol=1e-5)
    for done in (80, 303, 500):
        asked.clear()
        resumed = occlude(score, masks, batch_size=7, enough=enough, done=everything[:done])
        np.testing.assert_allclose(resumed, everything[:303], rtol=1e-5)
        assert asked == [60, 90, 135, 202, 303]
    asked.clear()
    assert len(occlude(score, masks, batch_size=64, enough=lambda scores: asked.append(len(scores)))) == 1000
    assert asked == [60, 90, 135, 202, 303, 454, 681]


@pytest.mark.parametrize(("seconds", "number"), [(-5, 10), (0, 10), (9.5, 10), (10.5, 20), (84, 90), (1e9, 100)])
def test_occlusion_stops_at_a_given_time_but_not_before_one_batch(monkeypatch, seconds, number):
    clock, score = Clock(), linear_score(GRID)
    monkeypatch.setattr(occlusion, "time", clock)
    masks = Masks(Partition.of(LEVELS), 100, 0.5, 0, "late")
    found = occlude(clock.slow(score), masks, batch_size=10, until=1000.0 + seconds)
    assert len(found) == number and clock.now == 1000 + number
    np.testing.assert_allclose(found, occlude(score, masks, batch_size=64)[:number], rtol=1e-5)


def test_a_time_limit_and_a_check_of_the_scores_can_be_combined(monkeypatch):
    clock, score, asked = Clock(), linear_score(GRID), []
    monkeypatch.setattr(occlusion, "time", clock)
    masks = Masks(Partition.of(LEVELS), 1000, 0.5, 0, "late")

    def enough(scores):
        asked.append(len(scores))
        return len(scores) >= 90

    limits = {"batch_size": 16, "enough": enough}
    assert len(occlude(clock.slow(score), masks, until=clock.now + 70, **limits)) == 76  # batches 48, 60, 76
    assert asked == [60]
    assert len(occlude(clock.slow(score), masks, until=clock.now + 200, **limits)) == 90
    assert asked == [60, 60, 90]
    assert len(occlude(clock.slow(score), masks, until=clock.now + 70, **limits, done=np.zeros((89, 3)))) == 90


def test_progress_and_checkpoints_report_all_scores_so_far(monkeypatch):
    monkeypatch.setattr(occlusion, "CHECKPOINT_SECONDS", -1.0)  # after every batch
    masks, score, counts, saved = Masks(Partition.of(LEVELS), 30, 0.5, 0, "u"), linear_score(GRID), [], []
    report = {"progress": counts.append, "checkpoint": lambda scores: saved.append(scores.copy())}
    found = occlude(score, masks, batch_size=8, **report)
    assert counts == [8, 16, 24, 30] and [len(scores) for scores in saved] == counts
    assert all(np.array_equal(scores, found[: len(scores)]) for scores in saved)
    counts.clear()
    assert np.array_equal(occlude(score, masks, batch_size=8, done=saved[1], **report), found)
    assert counts == [24, 30]
