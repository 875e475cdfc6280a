"""The kit against fixtures of the reference implementation, read from the folder named by XATTN_GOLDEN.

Sizes and seeds are taken from the files: any folder with files of the same names and arrays will do.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from xattn.compare import mean_std, min_max
from xattn.models.conformer import ConformerConfig, ConformerForConditionalGeneration
from xattn.occlusion import Partition, kl_divergence, occlude
from xattn.segments import segment_numbers, slic_pyramid

GOLDEN = Path(os.environ.get("XATTN_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason=f"there are no fixtures in {GOLDEN}: set XATTN_GOLDEN to the folder that holds them to run these tests",
)


def fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def prefixes(arrays: dict[str, np.ndarray], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in arrays if name.endswith(suffix)]


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def unpack(arrays: dict[str, np.ndarray], prefix: str = "") -> np.ndarray:
    """Masks stored as bits: bool (N, T, F), true where the cell was kept."""
    shape = arrays[f"{prefix}masks_shape"]
    bits = np.unpackbits(arrays[f"{prefix}masks_packed"], axis=1)[:, : shape[1:].prod()]
    return bits.reshape(shape).astype(bool)


def unit_masks(keep: np.ndarray, levels: np.ndarray, segmentation: np.ndarray):
    """The engine's form of given masks: level of each perturbation and its hidden units, read off one cell of each."""
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
    network.load_state_dict(weights)
    return network.eval()


def test_slic_pyramids_are_those_of_the_reference():
    golden = fixture("G1_slic")
    names = [name for name in prefixes(golden, "_segmentation") if f"{name}_fbank" in golden]
    assert len(names) >= 3
    for name in names:
        features = golden[f"{name}_fbank"]
        assert segment_numbers(len(features)) == golden[f"{name}_n_segments_passed"].tolist()
        assert np.array_equal(slic_pyramid(features) + 1, golden[f"{name}_segmentation"])
    smoothed = slic_pyramid(golden["short_fbank"], sigma=1.0)
    assert np.array_equal(smoothed + 1, golden["short_segmentation_sigma1"])


def test_segments_asked_for_at_every_length():
    golden = fixture("G1_slic")
    for frames, expected in zip(golden["n_frames_list"], golden["n_segments_for_n_frames"], strict=True):
        assert segment_numbers(int(frames)) == expected.tolist()


@pytest.mark.parametrize("prefix", ["main_", "never_"])
def test_scores_and_maps_of_spectrogram_occlusion(prefix):
    golden = {name.removeprefix(prefix): array for name, array in fixture("G2_scores").items() if prefix in name}
    log_p, log_q = (torch.from_numpy(golden[name]).double().log() for name in ("orig_probs", "perturbed_probs"))
    kl = kl_divergence(log_p, log_q)
    assert_close(kl, golden["kl"])
    partition = Partition.of(golden["segmentation"].astype(np.int64) - 1)
    masks = unit_masks(unpack(golden), golden["level"], golden["segmentation"])
    rows = iter(kl)
    scores = occlude(lambda keep: torch.stack([next(rows) for _ in keep]), partition, masks, batch_size=7)
    assert_close(scores.cells(partition.labels), golden["fbank_heatmap"])
    assert np.array_equal(scores.counts[partition.labels].sum(axis=0), golden["n_times_masked"])
    if prefix == "never_":
        assert (golden["n_times_masked"] == 0).any()
        assert not scores.cells(partition.labels)[:, golden["n_times_masked"] == 0].any()


def test_zero_probabilities_give_finite_scores_where_the_reference_gives_none():
    golden = fixture("G2_scores")
    log_p, log_q = (torch.from_numpy(golden[f"zero_{n}"]).double().log() for n in ("orig_probs", "perturbed_probs"))
    kl, reference = kl_divergence(log_p, log_q).numpy(), golden["zero_kl"]
    assert not np.isfinite(reference).all()
    assert np.isfinite(kl).all()
    defined = np.isfinite(reference)
    assert np.abs(kl[defined] - reference[defined]).max() <= 1e-5 * np.abs(reference[defined]).max()
    identical = np.abs(golden["zero_orig_probs"] - golden["zero_perturbed_probs"]).max(axis=(0, 2)) == 0
    assert identical.any() and np.abs(kl[:, identical]).max() == 0


@pytest.mark.parametrize("prefix", ["main_", "never_"])
def test_scores_and_maps_of_encoder_occlusion(prefix):
    golden = {n.removeprefix(prefix): array for n, array in fixture("G3_encoder_scores").items() if prefix in n}
    log_p, log_q = (torch.from_numpy(golden[name]).double().log() for name in ("orig_probs", "perturbed_probs"))
    kl = kl_divergence(log_p, log_q)
    assert_close(kl, golden["kl"])
    keep = golden["masks"][..., 0].astype(bool)
    partition = Partition.of(np.arange(keep.shape[1])[None])
    rows = iter(kl)
    masks = ((0, ~mask) for mask in keep)
    scores = occlude(lambda keep: torch.stack([next(rows) for _ in keep]), partition, masks, batch_size=5)
    assert_close(scores.cells(partition.labels), golden["heatmap"][..., 0])
    assert np.array_equal(scores.counts, golden["n_times_masked"])


def test_normalisers():
    golden = fixture("G4_normalisation")
    cases = prefixes(golden, "_mean_std_fbank")
    assert len(cases) >= 4
    for case in cases:
        spectrogram, previous = golden[f"{case}_fbank_heatmap"], golden[f"{case}_tgt_embed_heatmap"]
        tokens = len(previous)
        causal = np.where(np.tril(np.ones((tokens, tokens), dtype=bool))[..., None], previous, np.nan)
        flat = np.array([np.ptp(row) == 0 for row in spectrogram])
        # The reference leaves rounding residue on constant maps and NaN on maps without range; here both become 0.
        for name, result in {
            "mean_std": (*mean_std(spectrogram), *mean_std(causal)),
            "min_max": min_max(spectrogram, causal),
        }.items():
            for part, actual in zip(("fbank", "tgt"), result, strict=True):
                expected = golden[f"{case}_{name}_{part}"]
                assert np.isfinite(actual).all()
                compared = (
                    ~flat & np.isfinite(expected).all(axis=(1, 2))
                    if name == "mean_std"
                    else np.isfinite(expected).all(axis=(1, 2))
                )
                assert compared.any()
                if expected[compared].any():
                    assert_close(actual[compared], expected[compared])
                else:
                    assert not actual[compared].any()
        assert not mean_std(spectrogram)[0][flat].any()


@pytest.mark.parametrize("name", ["conformer_safe", "conformer_unsafe"])
def test_conformer_is_numerically_the_reference(name):
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


def test_features_to_maps_end_to_end():
    golden = fixture("end_to_end")
    network = conformer(golden)
    from xattn.models.conformer import ConformerModel

    network.config.language_ids = {}
    model = ConformerModel(network, tokenizer=None, name="golden", weights_hash="")
    features, ids = torch.from_numpy(golden["input_features"]), torch.from_numpy(golden["decoder_input_ids"])
    states = model.encode(features[None])
    log_p = model.decode(states, ids)
    assert np.abs(log_p[0].numpy() - golden["log_probs"]).max() < 1e-4
    attention = model.cross_attention(states, ids).numpy()
    assert np.abs(attention - golden["cross_attention"]).max() < 1e-4

    partition = Partition.of(golden["segmentation"].astype(np.int64) - 1)
    masks = unit_masks(unpack(golden), golden["level"], golden["segmentation"])
    seen = []

    def score(keep):
        seen.append(kl_divergence(log_p, model.decode(model.encode(features * keep), ids)))
        return seen[-1]

    scores = occlude(score, partition, masks, batch_size=16)
    np.testing.assert_allclose(torch.cat(seen).numpy(), golden["kl"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.cells(partition.labels), golden["input_saliency"], rtol=1e-4, atol=1e-5)

    keep = golden["encoder_masks"].astype(bool)
    steps = Partition.of(np.arange(keep.shape[1])[None])
    scores = occlude(
        lambda keep: kl_divergence(log_p, model.decode(states * keep[..., None], ids)),
        steps,
        ((0, ~mask) for mask in keep),
        batch_size=16,
    )
    np.testing.assert_allclose(scores.cells(steps.labels), golden["encoder_saliency"], rtol=1e-4, atol=1e-5)
