"""The kit against fixtures of the reference implementation.

tests/golden holds a part of them; XATTN_GOLDEN can name the folder of the complete set. Sizes and seeds come from the
files, so any folder with files and arrays of the same names works.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GivenMasks

from xattn.analysis.faithfulness import METRICS, area, masked_inputs, percentages, ranking, sentence_map, size
from xattn.analysis.normalisation import min_max, standardise
from xattn.attribution.estimators import UnitScores
from xattn.attribution.occlusion import Partition, kl_divergence, occlude
from xattn.attribution.segments import segment_numbers, slic_pyramid
from xattn.models import fama
from xattn.models.conformer import ConformerConfig, ConformerForConditionalGeneration, ConformerModel
from xattn.models.convert import fairseq

SHIPPED = Path(__file__).parent / "golden"
COMPLETE = os.environ.get("XATTN_GOLDEN")
GOLDEN = Path(COMPLETE or SHIPPED)
needs_all = pytest.mark.skipif(
    not COMPLETE, reason="tests/golden does not have this fixture: set XATTN_GOLDEN to the folder of the complete set"
)
MAIN = pytest.param("main_", marks=needs_all)


def fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def prefixes(arrays: dict[str, np.ndarray], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in arrays if name.endswith(suffix)]


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Compare the largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def unpack(arrays: dict[str, np.ndarray], prefix: str = "") -> np.ndarray:
    """Unpack masks stored as bits: bool (N, T, F), True where the cell was kept."""
    shape = arrays[f"{prefix}masks_shape"]
    bits = np.unpackbits(arrays[f"{prefix}masks_packed"], axis=1)[:, : shape[1:].prod()]
    return bits.reshape(shape).astype(bool)


def causal(previous: np.ndarray) -> np.ndarray:
    """A map over previous tokens (I, I, 1), NaN for the tokens j > i that token i cannot see."""
    return np.where(np.tril(np.ones((len(previous),) * 2, dtype=bool))[..., None], previous, np.nan)


def unit_masks(keep: np.ndarray, levels: np.ndarray, segmentation: np.ndarray):
    """Given masks in the engine's form: the level of each perturbation and its hidden units, from one cell of each."""
    for mask, level in zip(keep, levels, strict=True):
        labels, first = np.unique(segmentation[level], return_index=True)
        hidden = ~mask.reshape(-1)[first]
        assert np.array_equal(hidden[np.searchsorted(labels, segmentation[level])], ~mask)
        yield int(level), hidden


def conformer(arrays: dict[str, np.ndarray]) -> ConformerForConditionalGeneration:
    options = json.loads(str(arrays["config_json"]))
    config = ConformerConfig(
        vocab_size=len(arrays["weight:decoder.embed_tokens.weight"]),
        d_model=options["encoder_embed_dim"],
        encoder_layers=options["encoder_layers"],
        decoder_layers=options["decoder_layers"],
        encoder_attention_heads=options["encoder_attention_heads"],
        decoder_attention_heads=options["decoder_attention_heads"],
        encoder_ffn_dim=options["encoder_ffn_embed_dim"],
        decoder_ffn_dim=options["decoder_ffn_embed_dim"],
        conv_channels=options["conv_channels"],
        conv_kernel_sizes=[int(size) for size in options["conv_kernel_sizes"].split(",")],
        conformer_conv_kernel_size=options["conformer_conv_kernel_size"],
        input_feat_per_channel=options["input_feat_per_channel"],
        ctc_encoder_layer=options["ctc_encoder_layer"],
        batch_unsafe_relative_shift=options["batch_unsafe_relative_shift"],
        tie_word_embeddings=options["share_decoder_input_output_embed"],
    )
    network = ConformerForConditionalGeneration(config)
    weights = {n.removeprefix("weight:"): torch.from_numpy(a) for n, a in arrays.items() if n.startswith("weight:")}
    if config.tie_word_embeddings:
        weights.setdefault("decoder.output_projection.weight", weights["decoder.embed_tokens.weight"])
    network.load_state_dict(weights)
    return network.eval()


@needs_all
@pytest.mark.parametrize(
    "path", sorted(SHIPPED.glob("G*.*")) + [SHIPPED / "end_to_end.npz"], ids=lambda path: path.name
)
def test_the_shipped_fixtures_are_a_part_of_the_complete_set(path):
    if path.suffix == ".h5":
        assert path.read_bytes() == (GOLDEN / path.name).read_bytes()
        return
    with np.load(path) as ours, np.load(GOLDEN / path.name) as complete:
        assert len(ours.files) > 0
        for name in ours.files:
            assert ours[name].dtype == complete[name].dtype
            np.testing.assert_array_equal(ours[name], complete[name], err_msg=name)


def test_slic_pyramids_equal_the_reference():
    golden = fixture("G1_slic")
    names = [name for name in prefixes(golden, "_segmentation") if f"{name}_fbank" in golden]
    assert len(names) >= (3 if COMPLETE else 1)
    for name in names:
        features = golden[f"{name}_fbank"]
        assert segment_numbers(len(features)) == golden[f"{name}_n_segments_passed"].tolist()
        assert np.array_equal(slic_pyramid(features) + 1, golden[f"{name}_segmentation"])
    smoothed = slic_pyramid(golden["short_fbank"], sigma=1.0)
    assert np.array_equal(smoothed + 1, golden["short_segmentation_sigma1"])


def test_the_number_of_segments_equals_the_reference_at_every_length():
    golden = fixture("G1_slic")
    for frames, expected in zip(golden["n_frames_list"], golden["n_segments_for_n_frames"], strict=True):
        assert segment_numbers(int(frames)) == expected.tolist()


@pytest.mark.parametrize("prefix", [MAIN, "never_"])
def test_spectrogram_occlusion_equals_the_reference(prefix):
    golden = {
        name.removeprefix(prefix): array for name, array in fixture("G2_scores").items() if name.startswith(prefix)
    }
    log_p, log_q = (torch.from_numpy(golden[name]).double().log() for name in ("orig_probs", "perturbed_probs"))
    kl = kl_divergence(log_p, log_q)
    assert_close(kl, golden["kl"])
    partition = Partition.of(golden["segmentation"].astype(np.int64) - 1)
    masks = GivenMasks(partition, unit_masks(unpack(golden), golden["level"], golden["segmentation"]))
    rows = iter(kl)
    scores = UnitScores.of(occlude(lambda keep: torch.stack([next(rows) for _ in keep]), masks, batch_size=7), masks)
    assert_close(scores.cells(partition.labels), golden["fbank_heatmap"])
    assert np.array_equal(scores.counts[partition.labels].sum(axis=0), golden["n_times_masked"])
    if prefix == "never_":
        assert (golden["n_times_masked"] == 0).any()
        assert not scores.cells(partition.labels)[:, golden["n_times_masked"] == 0].any()


def test_zero_probabilities_give_finite_scores_unlike_the_reference():
    golden = fixture("G2_scores")
    log_p, log_q = (torch.from_numpy(golden[f"zero_{n}"]).double().log() for n in ("orig_probs", "perturbed_probs"))
    kl, reference = kl_divergence(log_p, log_q).numpy(), golden["zero_kl"]
    assert not np.isfinite(reference).all()
    assert np.isfinite(kl).all()
    defined = np.isfinite(reference)
    assert np.abs(kl[defined] - reference[defined]).max() <= 1e-5 * np.abs(reference[defined]).max()
    identical = np.abs(golden["zero_orig_probs"] - golden["zero_perturbed_probs"]).max(axis=(0, 2)) == 0
    assert identical.any() and np.abs(kl[:, identical]).max() == 0


@pytest.mark.parametrize("prefix", [MAIN, "never_"])
def test_encoder_occlusion_equals_the_reference(prefix):
    golden = {
        n.removeprefix(prefix): array for n, array in fixture("G3_encoder_scores").items() if n.startswith(prefix)
    }
    log_p, log_q = (torch.from_numpy(golden[name]).double().log() for name in ("orig_probs", "perturbed_probs"))
    kl = kl_divergence(log_p, log_q)
    assert_close(kl, golden["kl"])
    keep = golden["masks"][..., 0].astype(bool)
    partition = Partition.of(np.arange(keep.shape[1])[None])
    rows = iter(kl)
    masks = GivenMasks(partition, ((0, ~mask) for mask in keep))
    scores = UnitScores.of(occlude(lambda keep: torch.stack([next(rows) for _ in keep]), masks, batch_size=5), masks)
    assert_close(scores.cells(partition.labels), golden["heatmap"][..., 0])
    assert np.array_equal(scores.counts, golden["n_times_masked"])


def test_normalisers_equal_the_reference():
    golden = fixture("G4_normalisation")
    cases = prefixes(golden, "_mean_std_fbank")
    assert len(cases) >= 4
    flat_maps = 0
    for case in cases:
        maps = golden[f"{case}_fbank_heatmap"], causal(golden[f"{case}_tgt_embed_heatmap"])
        normalised = {"mean_std": [standardise(values) for values in maps], "min_max": min_max(*maps)}
        for name, ours in normalised.items():
            for part, values, actual in zip(("fbank", "tgt"), maps, ours, strict=True):
                expected = golden[f"{case}_{name}_{part}"]
                assert np.isfinite(actual).all()
                # Constant maps become 0 here; the reference leaves rounding residue or, after min_max, NaN.
                flat = np.nanmax(values, axis=(1, 2)) == np.nanmin(values, axis=(1, 2))
                compared = np.isfinite(expected).all(axis=(1, 2)) & ~(flat & (name == "mean_std"))
                if expected[compared].any():
                    assert_close(actual[compared], expected[compared])
                else:
                    assert not actual[compared].any()
                if name == "mean_std":
                    assert not actual[flat].any()
                    flat_maps += flat.sum()
    assert flat_maps > 0


@needs_all
@pytest.mark.parametrize("name", ["conformer_safe", "conformer_unsafe"])
def test_the_conformer_equals_the_reference_numerically(name):
    golden = fixture(name)
    network = conformer(golden)
    features, lengths = torch.from_numpy(golden["input_features"]), torch.from_numpy(golden["input_lengths"])
    attention_mask = (torch.arange(features.shape[1]) < lengths[:, None]).long()
    with torch.inference_mode():
        encoded = network.encoder(features, attention_mask)
        ctc = network.ctc_logits(encoded.hidden_states)[0]
        output = network(
            attention_mask=attention_mask,
            encoder_outputs=encoded,
            decoder_input_ids=torch.from_numpy(golden["decoder_input_ids"]),
            output_attentions=True,
            use_cache=False,
        )
    kept = ~golden["encoder_padding_mask"]
    assert not kept.all()
    pairs = {
        "encoder_out": (encoded.last_hidden_state.numpy()[kept], golden["encoder_out"][kept]),
        "ctc_out": (ctc.numpy()[kept], golden["ctc_out"].transpose(1, 0, 2)[kept]),
        "logits": (output.logits.numpy(), golden["logits"]),
        "cross_attention": (torch.stack(output.cross_attentions, 0).transpose(1, 2).numpy(), golden["cross_attention"]),
    }
    for actual, expected in pairs.values():
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() < 1e-4


@needs_all
@pytest.mark.parametrize("name", ["fairseq_args", "fairseq_cfg"])
def test_original_checkpoints_equal_the_reference_numerically(name):
    golden, checkpoint = fixture("conformer_safe"), GOLDEN / f"{name}.pt"
    network = fama.conformer(*fairseq.read_checkpoint(checkpoint), checkpoint)
    assert network.config.vocab_size == 40 and network.config.ctc_encoder_layer == 1
    features, lengths = torch.from_numpy(golden["input_features"]), torch.from_numpy(golden["input_lengths"])
    attention_mask = (torch.arange(features.shape[1]) < lengths[:, None]).long()
    ids = torch.from_numpy(golden["decoder_input_ids"])
    with torch.inference_mode():
        logits = network(features, attention_mask, decoder_input_ids=ids, use_cache=False).logits
    assert np.abs(logits.numpy() - golden["logits"]).max() < 1e-4


def test_maps_from_features_equal_the_reference():
    golden = fixture("end_to_end")
    network = conformer(golden).requires_grad_(False)
    network.config.language_ids = {}
    model = ConformerModel(network, tokenizer=None, source="golden", weights_hash="")
    features, ids = torch.from_numpy(golden["input_features"]), torch.from_numpy(golden["decoder_input_ids"])
    states = model.encode(features[None])
    log_p = model.decode(states, ids)
    assert np.abs(log_p[0].numpy() - golden["log_probs"]).max() < 1e-4
    attention = torch.stack(model.attentions(states, ids).cross)[:, 0].numpy()
    assert np.abs(attention - golden["cross_attention"]).max() < 1e-4

    partition = Partition.of(golden["segmentation"].astype(np.int64) - 1)
    masks = GivenMasks(partition, unit_masks(unpack(golden), golden["level"], golden["segmentation"]))
    kl = occlude(
        lambda keep: kl_divergence(log_p, model.decode(model.encode(features * keep), ids)), masks, batch_size=16
    )
    np.testing.assert_allclose(kl, golden["kl"], rtol=1e-4, atol=1e-5)
    cells = UnitScores.of(kl, masks).cells(partition.labels)
    np.testing.assert_allclose(cells, golden["input_saliency"], rtol=1e-4, atol=1e-5)

    keep = golden["encoder_masks"].astype(bool)
    steps = Partition.of(np.arange(keep.shape[1])[None])
    masks = GivenMasks(steps, ((0, ~mask) for mask in keep))
    decode = model.masked_decoder(states)
    kl = occlude(lambda keep: kl_divergence(log_p, decode(keep, ids)), masks, batch_size=16)
    cells = UnitScores.of(kl, masks).cells(steps.labels)
    np.testing.assert_allclose(cells, golden["encoder_saliency"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [MAIN, "normed_", "odd_", "ties_"])
def test_deletion_and_insertion_equal_the_reference(case):
    golden = {n.removeprefix(case): array for n, array in fixture("G5_deletion").items() if n.startswith(case)}
    if case == "normed_":
        # The previous tokens were occluded too here, and share the range of each token's map.
        previous = causal(golden["tgt_embed_heatmap"])
        cells = standardise(golden["fbank_heatmap"])
        absent = np.where(np.isnan(previous), np.nan, standardise(previous))
        assert_close(min_max(cells, absent)[0].mean(axis=0), golden["sentence_map"][0])
        without_previous = min_max(cells, np.zeros_like(previous))[0].mean(axis=0)
        assert_close(sentence_map(golden["fbank_heatmap"]), without_previous)
    order = ranking(golden["sentence_map"][0])
    stable = "_stable" if case == "ties_" else ""
    assert np.array_equal(order, golden[f"order{stable}"])
    features = torch.from_numpy(golden["fbank"])
    for name, insertion in (("deletion", False), ("insertion", True)):
        bits = np.unpackbits(golden[f"{name}_zero_packed{stable}"], axis=1)[:, : features.numel()].astype(bool)
        zeroed = (masked_inputs(features, order, insertion) == 0).flatten(1).numpy()
        assert np.array_equal(zeroed, bits)
        assert np.array_equal(zeroed.sum(axis=1), golden[f"{name}_n_zero"])


def test_areas_and_capped_word_error_rates_equal_the_reference():
    golden = fixture("G6_auc_wer")
    for name in ("rising", "random", "const100", "zero_first"):
        assert 100 * area(golden[f"auc_{name}_scores"], percentages()) == pytest.approx(
            float(golden[f"auc_{name}"]), rel=1e-12
        )
    tens = area(golden["auc_step10_scores"], golden["percent10"])
    assert 100 * tens == pytest.approx(float(golden["auc_step10"]), rel=1e-12)
    references, hypotheses = golden["wer_refs"].tolist(), golden["wer_hyps"].tolist()
    for reference, hypothesis, expected in zip(references, hypotheses, golden["wer_max_each"], strict=True):
        assert METRICS["corpus-capped WER"]([reference], [hypothesis]) == pytest.approx(expected)
    for group, corpus, mean in zip(
        golden["corpus_groups"], golden["corpus_wer_max"], golden["corpus_mean_of_each"], strict=True
    ):
        rows = group[group >= 0]
        pairs = [references[row] for row in rows], [hypotheses[row] for row in rows]
        assert METRICS["corpus-capped WER"](*pairs) == pytest.approx(corpus)
        assert METRICS["utterance-capped WER"](*pairs) == pytest.approx(mean)


def test_sizes_of_maps_equal_the_reference():
    golden = fixture("G7_size")
    names = prefixes({name: 0 for name in golden if name.startswith("u")}, "_fbank_heatmap")
    assert len(names) >= 3
    normalisers = {
        "none": lambda m: m,
        "mean_std": standardise,
        "min_max": lambda m: min_max(m, np.zeros((len(m), 1)))[0],
        "mean_std_then_min_max": lambda m: min_max(standardise(m), np.zeros((len(m), 1)))[0],
    }
    for name, normalise in normalisers.items():
        shares = [size(normalise(golden[f"{utterance}_fbank_heatmap"].astype(np.float64))) for utterance in names]
        np.testing.assert_allclose(np.mean([s for s, _ in shares], axis=0), golden[f"tgt0_{name}_fbank"], rtol=1e-9)
        assert np.mean([a for _, a in shares]) == pytest.approx(float(golden[f"tgt0_{name}_auc_fbank"]))
