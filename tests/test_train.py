"""Training: data, objective, schedule, resuming, and the exported model."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import SENTENCES, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from recipes import features
from recipes import train as recipe_code
from recipes.train import (
    RECIPES,
    SHIPPED,
    TrainingData,
    configuration,
    ctc_loss,
    initialise_encoder,
    learning_rate,
    losses,
    pad,
    spec_augment,
    train,
)
from xattn.audio import cmvn, log_mel
from xattn.data.corpus import load_corpus
from xattn.models import load_model
from xattn.models.conformer import ConformerConfig, ConformerForConditionalGeneration

TINY = replace(
    RECIPES["base"],
    name="tiny",
    languages=("en", "it"),
    encoder_layers=2,
    decoder_layers=2,
    vocabulary=40,
    schedule=((0, 0.0), (2, 2e-3), (6, 0.0)),
    translation_from=2,
    d_model=16,
    heads=2,
    batch_frames=300,
    dropout=0.1,
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with random training features in both languages and a dev part; a checkpoint after every step."""
    monkeypatch.setattr(recipe_code, "CHECKPOINT_SECONDS", -1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield data_folder(tmp_path / "data")
    torch.set_num_threads(threads)


def data_folder(folder):
    dev = [("en-dev-0", "dev", "en", "yes it is", "sì lo è"), ("it-dev-0", "dev", "it", "il merlo canta", "the bird")]
    write_corpus(folder, dev)
    (folder / "train").mkdir()
    rng = np.random.default_rng(0)
    for language, other in (("en", "it"), ("it", "en")):
        frames = rng.integers(60, 100, len(SENTENCES[language]))
        table = {
            "id": [f"{language}-{number}" for number in range(len(frames))],
            "start_frame": np.cumsum(frames) - frames,
            "frames": frames,
            "transcript": SENTENCES[language],
            "translation": SENTENCES[other],
        }
        pd.DataFrame(table).to_csv(folder / "train" / f"{language}.csv", index=False)
        np.save(folder / "train" / f"{language}.npy", rng.standard_normal((frames.sum(), 80)).astype(np.float16))
    return folder


def checkpoint(data):
    return torch.load(data / "train" / "checkpoints" / "tiny" / "last.pt", weights_only=True)


def flattened(state, name=""):
    if isinstance(state, dict):
        for key, value in state.items():
            yield from flattened(value, f"{name}/{key}")
    else:
        yield name, state


def test_interrupted_training_gives_the_same_weights(data, tmp_path, monkeypatch, capsys):
    train(TINY, data)
    uninterrupted = checkpoint(data)
    assert uninterrupted["step"] == 6

    again = data_folder(tmp_path / "again")
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recipe_code, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, again)
    halfway = checkpoint(again)
    assert halfway["step"] == 3 and not (again / "models").exists()
    train(TINY, again)
    assert "tiny: resuming at step 3 of 6" in capsys.readouterr().out

    continued = checkpoint(again)
    for part in ("network", "optimizer"):
        expected, actual = dict(flattened(uninterrupted[part])), dict(flattened(continued[part]))
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            same = torch.equal(value, actual[name]) if isinstance(value, torch.Tensor) else value == actual[name]
            assert same, name
    assert any(not torch.equal(value, continued["network"][name]) for name, value in halfway["network"].items())
    one, other = (load_model(folder / "models" / "tiny") for folder in (data, again))
    assert one.weights_hash == other.weights_hash


def test_training_resumes_with_a_longer_schedule_but_no_other_change(data, capsys):
    train(TINY, data)
    longer = replace(TINY, schedule=(*TINY.schedule, (TINY.steps + 1, 1e-3)), validate_every=7)
    train(longer, data)
    assert "tiny: resuming at step 6 of 7" in capsys.readouterr().out and checkpoint(data)["step"] == 7
    refusal = "holds a checkpoint of another recipe or other training data: move it away to start again"
    with pytest.raises(SystemExit, match=refusal):
        train(replace(longer, d_model=2 * TINY.d_model), data)
    table = data / "train" / "it.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("il ", "un "), encoding="utf-8")
    with pytest.raises(SystemExit, match=refusal):
        train(longer, data)


def test_exported_folder_is_a_model(data, capsys):
    train(TINY, data)
    assert f"tiny: written to {data / 'models' / 'tiny'}" in capsys.readouterr().out
    model = load_model(data / "models" / "tiny")
    assert (model.name, model.languages) == ("tiny", ("en", "it"))
    assert [model.tokens(model.prompt(language)) for language in model.languages] == [["<lang:en>"], ["<lang:it>"]]
    trained = checkpoint(data)["network"]
    exported = model.network.state_dict()
    assert exported.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(exported[name], value.half().to(value.dtype)), name
    assert all(model.tokenizer.decode(model.tokenizer.encode(text)) == text for text in SENTENCES["it"])
    log = pd.read_csv(data / "models" / "tiny" / "training_log.csv")
    assert log.step.tolist() == [6] and np.isfinite(log.drop(columns="step").to_numpy()).all()
    assert {"loss", "cross_entropy", "intermediate_ctc", "final_ctc", "dev_wer_en", "dev_wer_it"} <= set(log.columns)


def test_finished_training_is_not_repeated(data, monkeypatch):
    train(TINY, data)
    before = load_model(data / "models" / "tiny").weights_hash
    monkeypatch.setattr(recipe_code, "losses", lambda *arguments: pytest.fail("a training step ran again"))
    train(TINY, data)
    assert load_model(data / "models" / "tiny").weights_hash == before


def test_missing_features_are_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no training features for 'en' in .*: run `make data` first"):
        train(TINY, tmp_path)


def test_batches_hold_every_utterance_once_within_the_frame_limit(data):
    training = TrainingData(data / "train", ("en", "it"), 300)
    assert sorted(np.concatenate(training.batches)) == list(range(10))
    for rows in training.batches:
        features, table = training.batch(rows)
        lengths = [len(item) for item in features]
        assert lengths == table.frames.tolist() == sorted(lengths)
        assert len(lengths) * max(lengths) <= 300
        for item, row in zip(features, table.itertuples(), strict=True):
            stored = np.load(data / "train" / f"{row.language}.npy")[row.start_frame : row.start_frame + row.frames]
            assert np.array_equal(item, cmvn(stored))
    assert any(len(rows) > 2 for rows in training.batches)


def test_model_trains_on_features_of_another_corpus(tmp_path, monkeypatch, capsys):
    corpus, data = tmp_path / "corpus", tmp_path / "data"
    spoken = [(f"train-{i}", "train", "en", text, "") for i, text in enumerate(SENTENCES["en"])]
    spoken += [("null", "train", "en", "null", ""), ("silent", "train", "en", "a dog", "")]
    spoken += [("ciao", "train", "it", "ciao", ""), ("dev-0", "dev", "en", "yes it is", "")]
    write_corpus(corpus, spoken)
    silence = np.zeros(soundfile.info(corpus / "audio" / "silent.flac").frames, dtype=np.int16)
    soundfile.write(corpus / "audio" / "silent.flac", silence, 16_000)
    rows = pd.read_csv(corpus / "manifest.csv", keep_default_na=False).drop(columns="sha256")
    rows.to_csv(corpus / "manifest.csv", index=False)
    features.main([str(corpus), "en", "--data", str(data), "--processes", "1"])
    printed = capsys.readouterr().out
    assert "silent is skipped: " in printed and f"en: 6 utterances written to {data / 'train'}" in printed
    table = pd.read_csv(data / "train" / "en.csv", keep_default_na=False)
    stored = np.load(data / "train" / "en.npy")
    assert table.id.tolist() == ["null", *(f"train-{i}" for i in range(5))] and table.frames.sum() == len(stored)
    assert table.transcript.tolist() == ["null", *SENTENCES["en"]] and stored.dtype == np.float16
    audio = {u.id: u.audio() for u in load_corpus(corpus, language="en", split="train") if u.id != "silent"}
    for row in table.itertuples():
        own = stored[row.start_frame : row.start_frame + row.frames]
        assert np.array_equal(own, log_mel(audio[row.id]).astype(np.float16))

    rows[rows.id != "silent"].to_csv(corpus / "table.csv", index=False)
    features.main([str(corpus / "table.csv"), "en", "--data", str(tmp_path / "other"), "--processes", "1"])
    assert np.array_equal(np.load(tmp_path / "other" / "train" / "en.npy"), stored)

    train(
        replace(TINY, languages=("en",), vocabulary=28, translation_from=None, max_target_positions=24),
        data,
        dev_corpus=corpus,
    )
    model = load_model(data / "models" / "tiny")
    assert model.languages == ("en",) and model.decoding.max_length == 24
    for arguments, sentence in (
        ([str(corpus), "de"], "error: .* 'de'"),
        (
            [str(corpus / "table.csv"), "de"],
            "table.csv has no utterance in language 'de' and split 'train': choose another",
        ),
        ([str(tmp_path / "none"), "en"], "There is no .*none"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            features.main([*arguments, "--data", str(tmp_path / "empty")])
    assert not (tmp_path / "empty").exists()


def test_deeper_encoder_starts_equal_to_the_trained_one(model, tiny_folder):
    shallow = model.network.encoder
    deep = ConformerForConditionalGeneration(replace_layers(model.config, 5))
    decoder = {name: value.clone() for name, value in deep.decoder.state_dict().items()}
    initialise_encoder(deep, tiny_folder)
    features = torch.randn(2, 50, shallow.config.input_feat_per_channel)
    with torch.inference_mode():
        outputs = [encoder.eval()(features).last_hidden_state for encoder in (deep.encoder, shallow)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for layer, source in enumerate((0, 0, 0, 1, 1)):
        query = "attention.attention.query_proj.weight"
        repeated = deep.encoder.conformer_layers[layer].state_dict()[query]
        assert torch.equal(repeated, shallow.conformer_layers[source].state_dict()[query])
    assert torch.equal(deep.encoder.subsample.conv_layers[0].weight, shallow.subsample.conv_layers[0].weight)
    assert all(torch.equal(value, decoder[name]) for name, value in deep.decoder.state_dict().items())
    with pytest.raises(SystemExit, match="to copy the encoder from: train absent first"):
        initialise_encoder(deep, tiny_folder.parent / "absent")


def replace_layers(config, layers):
    return ConformerConfig.from_dict(config.to_dict() | {"encoder_layers": layers})


def test_learning_rate_is_interpolated_linearly():
    recipe = replace(TINY, schedule=((0, 0.0), (20, 0.5), (80, 0.2), (90, 0.3), (100, 0.0)))
    assert recipe.steps == 100
    rates = [learning_rate(step, recipe) for step in (0, 5, 20, 50, 80, 85, 90, 95, 100)]
    assert rates == pytest.approx([0.0, 0.125, 0.5, 0.35, 0.2, 0.25, 0.3, 0.15, 0.0])


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 120), seed=st.integers(0, 1000))
def test_spec_augment_hides_only_bands_and_stretches(frames, seed):
    features = torch.full((frames, 80), 3.0)
    result = spec_augment(features, np.random.default_rng(seed))
    assert (features == 3.0).all()  # the input is unchanged
    hidden = (result == 0).numpy()
    assert ((result == 3.0).numpy() | hidden).all()
    frames_hidden, mels_hidden = hidden.all(axis=1), hidden.all(axis=0)
    assert np.array_equal(hidden, np.logical_or.outer(frames_hidden, mels_hidden))
    assert torch.equal(result, spec_augment(features, np.random.default_rng(seed)))
    for flags, limit in ((frames_hidden, 50), (mels_hidden, 40)):
        if not hidden.all():
            assert flags.sum() <= limit
            assert (np.diff(np.concatenate([[0], flags, [0]])) == 1).sum() <= 2


def test_spec_augment_hides_the_expected_share():
    generator = np.random.default_rng(0)
    hidden = np.mean([(spec_augment(torch.ones(400, 80), generator) == 0).numpy() for _ in range(300)], axis=0)
    # Two bands of 0 to 20 and two stretches of 0 to 25, 10 and 12.5 wide on average, which may overlap.
    visible = (1 - 10 / 80) ** 2 * (1 - 12.5 / 400) ** 2
    assert hidden.mean() == pytest.approx(1 - visible, abs=0.02)
    assert hidden.mean(axis=1).min() > 0 and hidden.mean(axis=0).min() > 0


def test_padding():
    padded, lengths = pad([torch.ones(2, 3), torch.ones(4, 3)], -1.0)
    assert padded.shape == (2, 4, 3) and lengths.tolist() == [2, 4]
    assert padded[0, 2:].eq(-1).all() and padded[0, :2].eq(1).all()


def test_ctc_loss_is_averaged_over_tokens_then_utterances():
    generator = torch.Generator().manual_seed(0)
    logits, frames = torch.randn(2, 20, 40, generator=generator), torch.tensor([80, 50])
    targets = [torch.tensor([5, 6, 6, 7]), torch.tensor([9, 8])]
    each = []
    for row, steps in enumerate((20, 13)):
        log_p = logits[row, :steps].log_softmax(-1)[:, None]
        total = functional.ctc_loss(log_p, targets[row][None], (steps,), (len(targets[row]),), reduction="sum")
        each.append(float(total) / len(targets[row]))
    assert float(ctc_loss(logits, frames, targets)) == pytest.approx(np.mean(each), rel=1e-5)


def test_objective_is_the_weighted_sum_of_its_parts(made):
    network = made.network().train(False)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(frames, 80, generator=generator) for frames in (60, 44)]
    targets = [torch.tensor([10, 11, 12]), torch.tensor([13, 14])]
    transcripts = [torch.tensor([20, 21]), torch.tensor([22, 23, 24])]
    prompts = [torch.tensor([4]), torch.tensor([5])]
    parts = {k: v.item() for k, v in losses(network, TINY, features, transcripts, targets, prompts).items()}
    weighted = TINY.intermediate_ctc * parts["intermediate_ctc"] + TINY.final_ctc * parts["final_ctc"]
    assert parts["loss"] == pytest.approx(parts["cross_entropy"] + weighted, rel=1e-5)

    cross_entropies, first, second = [], [], []
    for item, target, transcript, prompt in zip(features, targets, transcripts, prompts, strict=True):
        with torch.inference_mode():
            encoded = network.encoder(item[None])
            inputs = torch.cat([prompt, target])[None]
            logits = network(encoder_outputs=encoded, decoder_input_ids=inputs, use_cache=False).logits[0]
            heads = network.ctc_logits(encoded.hidden_states)
        for row, label in zip(logits.log_softmax(-1), [*target.tolist(), 2], strict=True):
            smoothed = torch.full((40,), TINY.label_smoothing / 40)
            smoothed[label] += 1 - TINY.label_smoothing
            cross_entropies.append(-float((smoothed * row).sum()))
        first.append(float(ctc_loss(heads[0], torch.tensor([len(item)]), [transcript])))
        second.append(float(ctc_loss(heads[1], torch.tensor([len(item)]), [target])))
    expected = {"cross_entropy": cross_entropies, "intermediate_ctc": first, "final_ctc": second}
    for name, values in expected.items():  # training computes in bfloat16
        assert parts[name] == pytest.approx(np.mean(values), rel=0.02)


def test_recipe_has_the_size_of_the_papers_base_model():
    """Paper, section 4: 12 + 6 layers, 8 heads, width 512, 8,000 pieces, CTC after layer 8; 125 M parameters."""

    class Pieces:
        def __len__(self):
            return 8000

        def piece_to_id(self, piece):
            return 4

    with torch.device("meta"):
        network = ConformerForConditionalGeneration(configuration(RECIPES["paper/base"], Pieces()))
    assert sum(parameter.numel() for parameter in network.parameters()) == 116_440_704
    shape = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "ctc_encoder_layer")
    assert [getattr(network.config, name) for name in shape] == [12, 6, 8, 2048, 8]
    assert network.config.max_target_positions == 512
    assert "paper/base" not in SHIPPED
