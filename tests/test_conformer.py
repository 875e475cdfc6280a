import json
import math
import shutil

import numpy as np
import pytest
import torch
from pretrained import WITHOUT_EFFECT, changed, missing_from
from safetensors.torch import load_file, save_file

from xattn.models import Decoding, load_model
from xattn.models.conformer import ConformerForConditionalGeneration, relative_shift, subsampled
from xattn.models.weights import folder_hash

END = 2
LENGTHS = (90, 57, 34)


def features(frames, seed=0):
    return torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(seed))


def batch(lengths=LENGTHS):
    """Features of utterances of unequal length, padded with 0, and their attention mask."""
    single = [features(frames, seed) for seed, frames in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence([item[0] for item in single], batch_first=True)
    return single, padded, (torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]).long()


def shifted_by_definition(scores):
    """Put a zero column in front and read the matrix again from the second row on, cell by cell."""
    steps = len(scores)
    result = np.empty_like(scores)
    for row in range(steps):
        for column in range(steps):
            place = (row + 1) * steps + column
            old_row, old_column = place // (steps + 1), place % (steps + 1)
            result[row, column] = scores[old_row, old_column - 1] if old_column else 0.0
    return result


def test_relative_shift_follows_its_definition():
    scores = np.random.default_rng(0).standard_normal((2, 3, 7, 7))
    shifted = relative_shift(torch.from_numpy(scores), None).numpy()
    for index in np.ndindex(2, 3):
        assert np.array_equal(shifted[index], shifted_by_definition(scores[index]))
    rows, columns = np.tril_indices(7)
    assert np.array_equal(shifted[..., rows, columns], scores[..., rows, 6 - (rows - columns)])


def test_relative_shift_stays_within_each_utterance():
    scores = np.random.default_rng(0).standard_normal((4, 2, 7, 7))
    lengths = [7, 4, 7, 1]
    shifted = relative_shift(torch.from_numpy(scores), lengths).numpy()
    for row, length in enumerate(lengths):
        for head in range(2):
            expected = np.zeros((7, 7))
            expected[:length, :length] = shifted_by_definition(scores[row, head, :length, :length])
            assert np.array_equal(shifted[row, head], expected)


def test_four_frames_make_a_step(made):
    network = made.network()
    with torch.inference_mode():
        steps = [network.encoder(features(frames)).last_hidden_state.shape[1] for frames in range(1, 18)]
    assert steps == [math.ceil(frames / 4) for frames in range(1, 18)]
    assert [subsampled(frames) for frames in range(1, 18)] == subsampled(torch.arange(1, 18)).tolist() == steps


def outputs(network, inputs, mask, ids):
    with torch.inference_mode():
        encoded = network.encoder(inputs, mask)
        logits = network(
            attention_mask=mask, encoder_outputs=encoded, decoder_input_ids=ids.expand(len(inputs), -1), use_cache=False
        ).logits
        return encoded, network.ctc_logits(encoded.hidden_states), logits


def padding_error(network):
    """Largest changes in the states, CTC logits and decoder logits of each utterance when it is padded."""
    single, padded, mask = batch()
    ids = torch.tensor([4, 10, 11, 12])
    together, ctc, logits = outputs(network, padded, mask, ids)
    errors = []
    for row, inputs in enumerate(single):
        alone, ctc_alone, logits_alone = outputs(network, inputs, None, ids)
        steps = subsampled(inputs.shape[1])
        assert alone.last_hidden_state.shape == (1, steps, 16) and len(ctc) == 2
        pairs = [*zip(together.hidden_states, alone.hidden_states, strict=True), *zip(ctc, ctc_alone, strict=True)]
        differences = [(a[row, :steps] - b[0]).abs().max() for a, b in pairs]
        errors.append([float(max(differences)), float((logits[row] - logits_alone[0]).abs().max())])
    return np.array(errors)


def test_outputs_do_not_depend_on_the_rest_of_the_batch(made):
    assert padding_error(made.network()).max() < 1e-5


def test_outputs_of_the_unsafe_variant_depend_on_the_rest_of_the_batch(made):
    errors = padding_error(made.network(batch_unsafe_relative_shift=True))
    assert errors[0].max() < 1e-5  # the longest utterance has no padding
    assert errors[1:].min() > 1e-3


def test_saving_and_loading_keep_every_number(made, tmp_path):
    network = made.network(seed=3)
    network.save_pretrained(tmp_path)
    loaded = ConformerForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.language_ids == {"en": 4, "it": 5} and loaded.config.final_ctc
    expected, actual = network.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    inputs, ids = features(50), torch.tensor([4, 9, 8])
    assert torch.equal(outputs(network, inputs, None, ids)[2], outputs(loaded, inputs, None, ids)[2])


def test_half_precision_weights_are_loaded_as_float32(made, tiny_folder, tmp_path):
    made.network().half().save_pretrained(tmp_path)
    (tmp_path / "spm.model").write_bytes((tiny_folder / "spm.model").read_bytes())
    model = load_model(tmp_path)
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}
    difference = model.encode(features(50)) - load_model(tiny_folder).encode(features(50))
    assert 0 < difference.abs().max() < 0.05


def test_a_loaded_model_has_the_interface(model, tiny_folder):
    assert missing_from(model) == {"detect_language"}
    assert model.name == "tiny" and model.languages == ("en", "it")
    assert model.weights_hash == folder_hash(tiny_folder)
    assert model.frame_seconds == 0.01 and not model.detects_language
    assert model.step_frames(10).tolist() == [[0, 4], [4, 8], [8, 12]]
    assert model.prompt("it").tolist() == [5]
    assert model.encode(features(45)).shape == (1, 12, 16)
    ids = torch.tensor([*model.tokenizer.encode("the dog sì"), END])
    assert "".join(model.tokens(ids)) == "▁the▁dog▁sì</s>"
    assert model.text(torch.cat([model.prompt("en"), ids])) == "the dog sì"
    assert torch.equal(model.token_ids("the dog sì"), ids)
    assert model.token_ids("").tolist() == [END]


def test_rows_of_decode_are_log_probabilities(model):
    ids = torch.tensor([4, 10, 11, 12, 13])
    states = torch.cat([model.encode(features(50)), model.encode(features(50, seed=1))])
    log_p = model.decode(states, ids)
    logits = torch.cat([outputs(model.network, features(50, seed), None, ids)[2] for seed in (0, 1)])
    assert log_p.shape == (2, 5, 40)
    np.testing.assert_allclose(log_p, logits - logits.exp().sum(-1, keepdim=True).log(), atol=1e-5)
    assert (log_p[0] - log_p[1]).abs().max() > 0.1  # the decoder uses the audio
    np.testing.assert_allclose(model.decode(states, ids[:3]), log_p[:, :3], atol=1e-5)  # and does not see later tokens


def test_cross_attention_follows_from_its_projections(model):
    states, ids = model.encode(features(50)), torch.tensor([4, 10, 11, 12])
    attention = torch.stack(model.attentions(states, ids).cross)[:, 0]
    assert attention.shape == (2, 2, 4, 13)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-6)
    queries = []
    for layer in model.network.decoder.layers:
        hook = layer.encoder_attn_layer_norm.register_forward_hook(
            lambda module, inputs, output: queries.append(output)
        )
        model.decode(states, ids)
        hook.remove()
    for index, layer in enumerate(model.network.decoder.layers):
        with torch.inference_mode():
            q = layer.encoder_attn.q_proj(queries[index])[0].view(4, 2, 8)
            k = layer.encoder_attn.k_proj(states)[0].view(13, 2, 8)
        expected = torch.einsum("ihd,shd->his", q, k).div(8**0.5).softmax(-1)
        np.testing.assert_allclose(attention[index], expected, atol=1e-6)
    assert attention.std(-1).max() > 0.01


def changed_search(model, monkeypatch, **changes):
    """Change arguments of the model's search; return a list that collects what each search returns."""
    search, results = model.network.generate, []

    def changed(**arguments):
        results.append(search(**arguments | changes))
        return results[-1] if isinstance(results[-1], torch.Tensor) else results[-1].sequences

    monkeypatch.setattr(model.network, "generate", changed)
    return results


def repeats(ids, size):
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return len(grams) - len(set(grams))


@pytest.mark.parametrize("language", ["en", "it"])
def test_a_search_with_one_beam_is_greedy(model, language):
    inputs = features(60)
    states, expected = model.encode(inputs), model.prompt(language).tolist()
    limit = model.config.max_target_positions
    while len(expected) < limit - 1 and expected[-1] != END:
        log_p = model.decode(states, torch.tensor(expected))[0, -1]
        for token in log_p.argsort(descending=True).tolist():
            if not repeats([*expected, token], 5):
                expected.append(token)
                break
    if expected[-1] != END:
        expected.append(END)  # an output of the greatest length is closed
    assert model.generate(inputs, language, decoding=Decoding(beams=1))[0].tolist() == expected[1:]


def test_decoding_replaces_the_model_s_settings(model):
    assert model.decoding == Decoding(beams=5, max_length=16, no_repeat_ngram=5)
    inputs = features(60)
    states = model.encode(inputs)
    ids = model.generate(inputs, "en", decoding=Decoding(beams=1, max_length=9, no_repeat_ngram=0))[0].tolist()
    expected = model.prompt("en").tolist()
    while len(expected) < 8 and expected[-1] != END:
        expected.append(int(model.decode(states, torch.tensor(expected))[0, -1].argmax()))
    assert ids == [*expected[1:], END][: len(ids)] and len(ids) == 8 and repeats(ids, 2) > 0
    for length in (4, 6):
        assert len(model.generate(inputs, "en", decoding=Decoding(max_length=length))[0]) <= length - 1
    default = model.generate(inputs, "en")[0]
    assert torch.equal(model.generate(inputs, "en", decoding=Decoding())[0], default)
    assert torch.equal(model.generate(inputs, "en", decoding=model.decoding)[0], default)
    assert repeats(model.generate(inputs, "en", decoding=Decoding(no_repeat_ngram=2))[0].tolist(), 2) == 0
    with pytest.raises(ValueError, match="max_length is 17: give a number from 2 to 16 for tiny"):
        model.generate(inputs, "en", decoding=Decoding(max_length=17))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beams": 0}, "beams is 0: give a whole number of at least 1, or None"),
        ({"beams": 2.0}, "beams is 2.0: give a whole number of at least 1, or None"),
        ({"beams": True}, "beams is True: give a whole number of at least 1, or None"),
        ({"max_length": 1}, "max_length is 1: give a whole number of at least 2, or None"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1: give a whole number of at least 0, or None"),
    ],
)
def test_decoding_settings_out_of_range_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Decoding(**options)


@pytest.mark.parametrize("language", ["en", "it"])
def test_beam_search_follows_the_distributions_of_the_forced_decoding(model, monkeypatch, language):
    results = changed_search(model, monkeypatch, return_dict_in_generate=True, output_scores=True)
    inputs = features(60)
    (ids,) = model.generate(inputs, language)
    assert results[0].sequences[0].tolist() == [*model.prompt(language).tolist(), *ids.tolist()]
    forced = torch.cat([model.prompt(language), ids])
    log_p = model.decode(model.encode(inputs), forced[:-1])[0].gather(1, ids[:, None])[:, 0]
    if len(forced) == model.config.max_target_positions:
        log_p[-1] = 0.0  # </s> had no alternative
    assert results[0].sequences_scores.item() == pytest.approx(float(log_p.mean()), abs=1e-4)


def test_outputs_end_and_do_not_repeat_five_tokens(model):
    seen = set()
    for seed in range(4):
        for language in model.languages:
            ids = model.generate(features(60 + 9 * seed, seed), language)[0].tolist()
            assert ids.count(END) == 1 and ids[-1] == END
            assert repeats([model.prompt(language).item(), *ids], 5) == 0
            seen.add(tuple(ids))
    assert len(seen) > 2  # outputs depend on the audio and on the language


def test_outputs_of_a_padded_batch_equal_those_of_single_utterances(model):
    single, padded, mask = batch()
    together = model.generate(padded, "it", mask)
    alone = [model.generate(inputs, "it")[0] for inputs in single]
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in alone]


def test_a_language_that_the_model_does_not_write_raises(model):
    for call in (model.prompt, lambda language: model.generate(features(30), language)):
        with pytest.raises(ValueError, match="The model tiny does not write 'fr'; choose one of en, it"):
            call("fr")


@pytest.mark.parametrize("entry", WITHOUT_EFFECT, ids=str)
def test_the_attention_that_config_json_asks_for_has_no_effect(model, tiny_folder, tmp_path, entry):
    other, ids = load_model(changed(tiny_folder, tmp_path / "tiny", **entry)), torch.tensor([4, 10, 11, 12])
    states = model.encode(features(50))
    assert other.config._attn_implementation == model.config._attn_implementation == "eager"
    assert torch.equal(other.encode(features(50)), states)
    assert torch.equal(other.decode(states, ids), model.decode(states, ids))
    pairs = zip(other.attentions(states, ids).cross, model.attentions(states, ids).cross, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model folder .*nowhere: give the path of one"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "spm.model"])
def test_a_missing_file_raises(tiny_folder, tmp_path, name):
    for file in tiny_folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} has no {name}: give the folder of a trained model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "names no model_type: download or train the model again"),
        ("[]", "names no model_type: download or train the model again"),
        ('{"d_model": 8}', "names no model_type: download or train the model again"),
        ('{"model_type": "wav2vec2"}', "describes a 'wav2vec2' model: give one of xattn_conformer"),
    ],
)
def test_an_unknown_configuration_raises(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json {sentence}"):
        load_model(tmp_path)


def test_an_unavailable_device_raises(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.device(device) and 1 / 0)
    with pytest.raises(
        ValueError, match=r"no CUDA device here that torch can use \(division by zero\): set device to cpu"
    ):
        load_model(tiny_folder, "cuda")
    monkeypatch.undo()
    for device in ("gpu", "", "cuda:99"):
        with pytest.raises(ValueError, match=f"There is no device '{device}' here .*: set device to cpu") as error:
            load_model(tiny_folder, device)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"spm.model": "junk"}, "spm.model is damaged or no SentencePiece model: download it again"),
        ({"spm.model": ""}, "spm.model is damaged or no SentencePiece model: download it again"),
        ({"vocab.json": "{"}, "vocab.json is not a JSON object of pieces and their ids: download it again"),
        ({"vocab.json": "[1]"}, "vocab.json is not a JSON object of pieces and their ids: download it again"),
        ({"vocab.json": '{"a": 0}'}, "The vocabulary of .*tiny has 1 pieces, but the model has 40: give its own"),
        (
            {"d_model": 32},
            r"do not fit its config.json \(decoder.embed_tokens.weight is \[40, 16\] and not \[40, 32\]; .*",
        ),
        (
            {"decoder_attention_heads": 3},
            "No network can be built from .*config.json .*divisible.*: download or train the",
        ),
        ({"vocab_size": "many"}, "No network can be built from .*config.json .*expected int, got str .*: download or"),
        (
            {"language_ids": None},
            "language_ids in the config.json of .*tiny are None, but languages with token ids below",
        ),
        ({"language_ids": {"en": 40}}, r"are {'en': 40}, but languages with token ids below 40 are needed: download"),
        ({"language_ids": {"en": "4"}}, r"are {'en': '4'}, but languages with token ids below 40 are needed: down"),
    ],
)
def test_files_that_do_not_fit_each_other_raise(tiny_folder, tmp_path, capfd, change, sentence):
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_folder, copy)
    load_model(copy)
    configuration = json.loads((copy / "config.json").read_text())
    for name, value in change.items():
        if name in configuration:
            (copy / "config.json").write_text(json.dumps(configuration | {name: value}))
        else:
            (copy / name).write_text(value)
    capfd.readouterr()
    with pytest.raises(ValueError, match=sentence) as error:
        load_model(copy)
    assert "\n" not in str(error.value) and str(error.value).endswith(".") and len(str(error.value)) < 400
    assert capfd.readouterr() == ("", "")  # transformers' table is not printed


def test_unused_tensors_are_reported(tiny_folder, tmp_path, capfd):
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    configuration = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(configuration | {"final_ctc": False}))
    load_model(tmp_path / "tiny")
    names = "encoder.final_ctc_fc.bias, encoder.final_ctc_fc.weight"
    printed = f"{tmp_path / 'tiny'}: not used, because config.json describes no such weights: {names}\n"
    assert capfd.readouterr() == (printed, "")


def test_the_hash_depends_on_the_contents_and_not_on_their_layout(tiny_folder, tmp_path):
    tensors = load_file(tiny_folder / "model.safetensors")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    save_file(dict(reversed(tensors.items())), copy / "model.safetensors", metadata={"note": "another layout"})
    assert (copy / "model.safetensors").read_bytes() != (tiny_folder / "model.safetensors").read_bytes()
    assert folder_hash(copy) == folder_hash(tiny_folder)
    for name in ("config.json", "spm.model"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b" ")
        assert folder_hash(copy) != folder_hash(tiny_folder)
        (copy / name).write_bytes(before)
    name = "decoder.layers.1.fc1.bias"
    tensors[name][3] = torch.nextafter(tensors[name][3], torch.tensor(1.0))
    save_file(tensors, copy / "model.safetensors")
    assert folder_hash(copy) != folder_hash(tiny_folder)


def test_the_masked_decoder_equals_decoding_masked_states(model):
    states = model.encode(features(70))
    keep = (torch.rand(5, states.shape[1], generator=torch.Generator().manual_seed(1)) < 0.4).float()
    keep[0], keep[1] = 1.0, 0.0
    decode = model.masked_decoder(states)
    for ids in (torch.tensor([4, 10, 11, 12]), torch.tensor([5, 9])):
        expected = model.decode(states * keep[..., None], ids)
        assert (expected[0] - expected[1]).abs().max() > 0.1
        torch.testing.assert_close(decode(keep, ids), expected, rtol=1e-4, atol=1e-5)


def test_a_model_has_the_name_of_its_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder)
    assert load_model(".").name == "tiny"
    monkeypatch.chdir(tiny_folder.parent)
    assert load_model("./tiny/").name == "tiny"
    link = tmp_path / "mine"
    link.symlink_to(tiny_folder, target_is_directory=True)
    assert load_model(link).name == "mine"


def test_masked_cells_become_0(model):
    inputs = features(30)[0]
    keep = (torch.rand(3, *inputs.shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    masked = model.mask_input(inputs, keep)
    assert masked.shape == (3, 30, 80) and torch.equal(masked, torch.where(keep.bool(), inputs, 0.0))
