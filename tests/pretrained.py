"""Shared by the tests of transformers' own models: random weights, and the checks that every architecture passes.

The oracle is the checkpoint's own network on the output of its own feature extractor.
"""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import without_seconds
from safetensors.torch import load_file, save_file
from torch.nn import functional

from xattn.analysis.correlation import correlate
from xattn.analysis.faithfulness import deletion_curves, percentages
from xattn.analysis.quality import transcribe
from xattn.analysis.sanity import layers_from_output
from xattn.attribution.attention import cross_attention
from xattn.explain import Occlusion, explain
from xattn.figures import heatmaps
from xattn.maps import SPECIAL_TOKENS, drop_special_tokens, masks_of
from xattn.models import Decoding, S2TModel, load_model
from xattn.store import KEY

PAPER = Decoding(beams=5, no_repeat_ngram=5)
# Entries of config.json that must not change a model.
WITHOUT_EFFECT = (
    *({name: "flash_attention_2"} for name in ("attn_implementation", "_attn_implementation")),
    *({"attn_implementation": value} for value in ("sdpa", "eager", "owner/kernel", {"": "owner/kernel"})),
    *({name: {"attn_implementation": "owner/kernel", "d_model": 7}} for name in ("text_config", "decoder")),
    {"return_dict": False},
)
SMALL = {"input_masks": 12, "encoder_masks": 10, "batch_size": 5, "precision": "float32"}


def quietly(model, utterance, direction=None, **changes):
    """Explain with few masks, without printing; by default in the direction of the utterance's language."""
    language, _, target = (direction or utterance.language).partition("-")
    occlusion = Occlusion(**SMALL | changes)
    arguments = {"language": language, "translate_to": target or None}
    return explain(model, utterance, occlusion=occlusion, progress=False, **arguments)


def changed(folder, copy, file="config.json", **entries):
    """Copy a model folder and change entries of a file; None removes one."""
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text(encoding="utf-8")) | entries
    content = {name: value for name, value in content.items() if value is not None}
    (copy / file).write_text(json.dumps(content), encoding="utf-8")
    return copy


def randomised(network, end=1.5, seed=0):
    """Give a network random weights with which its attention depends on the audio.

    end: how much the last token is favoured over others, so that some outputs end early.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "attn." in name or "attention." in name or name.endswith(("embed_tokens.weight", "shared.weight")):
                value.normal_(std=0.5, generator=generator)
            elif "conv" in name or ".fc" in name or "ffn" in name:
                value.normal_(std=0.3, generator=generator)
        decoder = network.get_decoder()
        decoder.layer_norm.bias += end * decoder.embed_tokens.weight[network.config.eos_token_id]
    return network.eval()


def missing_from(model):
    """The names in the interface of all models that a model lacks."""
    names = {*S2TModel.__annotations__, *(name for name in vars(S2TModel) if not name.startswith("_"))}
    assert {"step_frames", "token_ids", "languages"} < names
    return {name for name in names if not hasattr(model, name)}


def log_p(network, inputs, ids):
    """Log-probabilities (I, V) of the network's own forward pass over its own inputs."""
    with torch.inference_mode():
        return network(**inputs, decoder_input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)


class PretrainedChecks:
    """Checks for a module whose fixture `folder` is a checkpoint in transformers' format.

    Subclasses provide DIRECTIONS, of which the first is explained, and three methods. `framed(model, inputs)` returns a
    view of input_features as frames (T, F). `search(model, inputs, direction)` is transformers' documented beam search
    and returns tokens with or without the prompt. `seconds(frames, steps)` returns the times of frames and steps.
    """

    ATTENTION = "sdpa"  # transformers' default; weights need "eager"

    def own(self, model, audio):
        """Arguments of the network from its feature extractor: input_features (1, ...), attention_mask."""
        return dict(model.extractor(audio, sampling_rate=16_000, return_tensors="pt"))

    @pytest.fixture
    def maps(self, pretrained, utterances):
        return quietly(pretrained, utterances[1], self.DIRECTIONS[0])

    def test_it_has_the_whole_interface(self, pretrained):
        missing = missing_from(pretrained)
        assert missing == (set() if pretrained.detects_language else {"detect_language"})

    def test_features_equal_those_of_its_extractor(self, pretrained, audio):
        features, inputs = pretrained.features(audio), self.own(pretrained, audio)
        assert features.dtype == torch.float32 and features.shape[1] == len(pretrained.band_centres) == 80
        framed = self.framed(pretrained, inputs)[: len(features)]
        assert torch.equal(framed, features) and features.std() > 0.1

    def test_band_centres_are_the_peaks_of_its_filters(self, pretrained):
        filters = pretrained.extractor.mel_filters  # (frequencies, F) from 0 to 8,000 Hz
        bins = np.linspace(0, 8000, len(filters))
        peaks, width = bins[filters.argmax(axis=0)], bins[1]
        assert np.abs(peaks - pretrained.band_centres).max() < width
        assert (np.diff(pretrained.band_centres) > 0).all()

    def test_log_probabilities_equal_those_of_its_network(self, pretrained, audio):
        features, inputs = pretrained.features(audio), self.own(pretrained, audio)
        for direction in self.DIRECTIONS:
            prompt = pretrained.prompt(direction)
            ids = torch.cat([prompt, torch.tensor([20, 21, 22, 23])])
            expected = log_p(pretrained.network, inputs, ids)
            found = pretrained.decode(pretrained.encode(features[None]), ids)
            assert found.shape == (1, len(ids), pretrained.config.vocab_size)
            np.testing.assert_allclose(found[0], expected, atol=2e-5)
        other = {**inputs, "input_features": torch.roll(inputs["input_features"], 7, dims=-1)}
        assert (log_p(pretrained.network, other, ids) - expected).abs().max() > 0.1  # the decoder uses the audio

    def test_attention_equals_that_of_its_network(self, pretrained, folder, audio):
        inputs = self.own(pretrained, audio)
        ids = torch.cat([pretrained.prompt(self.DIRECTIONS[0]), torch.tensor([20, 21])])
        eager = type(pretrained).NETWORK.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.inference_mode():
            expected = eager(**inputs, decoder_input_ids=ids[None], output_attentions=True).cross_attentions
        usual = pretrained.config._attn_implementation
        states = pretrained.encode(pretrained.features(audio)[None])
        found = cross_attention(pretrained, states, ids)
        assert pretrained.config._attn_implementation == usual
        assert found.shape == (3, 2, len(ids), states.shape[1])
        np.testing.assert_allclose(found, torch.stack(expected)[:, 0], atol=1e-5)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
        assert found.max(-1).mean() > 1.5 * found.mean()  # not flat

    @pytest.mark.parametrize("entry", WITHOUT_EFFECT, ids=str)
    def test_the_attention_that_its_config_asks_for_has_no_effect(
        self, pretrained, folder, audio, tmp_path, monkeypatch, entry
    ):
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
        model = load_model(changed(folder, tmp_path / folder.name, **entry))
        features, ids = model.features(audio)[None], torch.tensor([20, 21, 22])
        assert model.config._attn_implementation == self.ATTENTION
        assert torch.equal(
            model.decode(model.encode(features), ids), pretrained.decode(pretrained.encode(features), ids)
        )
        found, expected = (each.generate(features, self.DIRECTIONS[0])[0] for each in (model, pretrained))
        assert torch.equal(found, expected)

    def test_the_masked_decoder_equals_decoding_masked_states(self, pretrained, audio):
        features = pretrained.features(audio)
        states, steps = pretrained.encode(features[None]), len(pretrained.step_frames(len(features)))
        keep = (torch.rand(5, steps, generator=torch.Generator().manual_seed(1)) < 0.4).float()
        keep[0], keep[1] = 1.0, 0.0
        whole = functional.pad(keep, (0, states.shape[1] - steps), value=1.0)
        decode = pretrained.masked_decoder(states)
        for ids in (torch.tensor([20, 21, 22]), torch.tensor([23, 24])):
            expected = pretrained.decode(states * whole[..., None], ids)
            assert (expected[0] - expected[1]).abs().max() > 0.01
            torch.testing.assert_close(decode(keep, ids), expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(decode(keep[:1], ids), pretrained.decode(states, ids), atol=1e-4)

    def test_outputs_equal_those_of_its_documented_search(self, pretrained, audio):
        found = {}
        for direction in self.DIRECTIONS:
            (ids,) = pretrained.generate(pretrained.features(audio)[None], direction, decoding=PAPER)
            expected = self.search(pretrained, self.own(pretrained, audio), direction).tolist()
            prompt, end = pretrained.prompt(direction).tolist(), pretrained.config.eos_token_id
            assert ids[-1] == end and ids.tolist().count(end) == 1 and len(ids) > 1
            expected = expected[len(prompt) :] if expected[: len(prompt)] == prompt else expected
            assert ids[:-1].tolist() == [token for token in expected if token != end]
            again = pretrained.generate(pretrained.features(audio)[None], direction, decoding=PAPER)[0]
            assert torch.equal(again, ids)
            found[direction] = ids.tolist()
        assert len({tuple(ids) for ids in found.values()}) == len(self.DIRECTIONS)

    def test_the_default_search_is_that_of_its_generation_config(self, pretrained, audio):
        own = pretrained.network.generation_config
        assert pretrained.decoding.beams == (own.num_beams or 1)
        assert pretrained.decoding.no_repeat_ngram == (own.no_repeat_ngram_size or 0)
        features, direction = pretrained.features(audio)[None], self.DIRECTIONS[0]
        default = pretrained.generate(features, direction)[0]
        assert torch.equal(pretrained.generate(features, direction, decoding=pretrained.decoding)[0], default)
        prompt = len(pretrained.prompt(direction))
        assert len(pretrained.generate(features, direction, decoding=Decoding(max_length=prompt + 3))[0]) <= 3
        limit = pretrained.output_limit
        for length in {2, prompt, limit + 1} - {prompt + 1}:
            sentence = f"max_length is {length}: give a number from {prompt + 1} to {limit} for {pretrained.name}"
            with pytest.raises(ValueError, match=sentence):
                pretrained.generate(features, direction, decoding=Decoding(max_length=length))

    def test_the_search_of_its_generation_config_leaves_the_cache_and_the_output_to_the_kit(
        self, pretrained, folder, audio, tmp_path
    ):
        own = {"cache_implementation": "static", "return_dict_in_generate": True, "output_scores": True}
        model = load_model(changed(folder, tmp_path / folder.name, "generation_config.json", **own))
        features = pretrained.features(audio)[None]
        found, expected = (each.generate(features, self.DIRECTIONS[0])[0] for each in (model, pretrained))
        assert torch.equal(found, expected)

    def test_a_greatest_number_of_new_tokens_can_be_replaced(self, pretrained, folder, audio, tmp_path):
        model = load_model(changed(folder, tmp_path / folder.name, "generation_config.json", max_new_tokens=3))
        features, direction = model.features(audio)[None], self.DIRECTIONS[0]
        prompt = len(model.prompt(direction))
        assert model.decoding.max_length == prompt + 3 and len(model.generate(features, direction)[0]) <= 3
        for length in (prompt + 2, model.output_limit):
            decoding = Decoding(max_length=length, beams=5, no_repeat_ngram=5)
            found, expected = (each.generate(features, direction, decoding=decoding)[0] for each in (model, pretrained))
            assert torch.equal(found, expected)

    def test_a_text_is_recovered_from_its_token_ids(self, pretrained):
        for text in ("the dog sleeps", "sì lo è", "a cat"):
            ids = pretrained.token_ids(text)
            assert ids[-1] == pretrained.config.eos_token_id and ids.tolist().count(int(ids[-1])) == 1
            assert pretrained.text(ids) == text
            assert torch.equal(pretrained.token_ids(pretrained.text(ids)), ids)

    def test_outputs_do_not_depend_on_the_rest_of_the_batch(self, pretrained, utterances):
        features = [pretrained.features(utterance.audio()) for utterance in utterances]
        assert len(features[0]) != len(features[1])
        direction = self.DIRECTIONS[0]
        alone = [pretrained.text(pretrained.generate(one[None], direction)[0]) for one in features]
        assert transcribe(pretrained, features, direction) == alone and alone[0] != alone[1]
        if not pretrained.padding_safe:
            padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
            mask = torch.ones(padded.shape[:2], dtype=torch.long)
            mask[0, len(features[0]) :] = 0
            with pytest.raises(ValueError, match="depend on how much its input is padded: give it one utterance"):
                pretrained.generate(padded, direction, mask)

    def test_padding_changes_states_unless_padding_safe(self, pretrained, audio):
        features = pretrained.features(audio)
        padded = functional.pad(features, (0, 0, 0, 48))[None]
        mask = (torch.arange(padded.shape[1]) < len(features)).long()[None]
        alone, encoder = pretrained.encode(features[None]), pretrained.network.get_encoder()
        with torch.inference_mode():
            together = encoder(**pretrained.network_inputs(padded, mask)).last_hidden_state[:, : alone.shape[1]]
        assert ((together - alone).abs().max() < 1e-4) == pretrained.padding_safe

    def test_maps_have_the_kit_s_axes(self, pretrained, maps, utterances):
        features = pretrained.features(utterances[1].audio())
        frames, steps = len(features), len(pretrained.step_frames(len(features)))
        (ids,) = pretrained.generate(features[None], self.DIRECTIONS[0])
        assert maps.cross_attention.dims == ("layer", "head", "token", "step")
        assert maps.cross_attention.shape == (3, 2, len(ids), steps)
        assert maps.input_saliency.dims == ("token", "time", "mel")
        assert maps.input_saliency.shape == (len(ids), frames, 80)
        assert maps.encoder_saliency.dims == ("token", "step")
        assert maps.encoder_saliency.shape == (len(ids), steps)
        times, middles = self.seconds(frames, steps)
        np.testing.assert_allclose(maps.time, times, atol=1e-9)
        np.testing.assert_allclose(maps.step, middles, atol=1e-9)
        assert abs(utterances[1].duration - maps.time.values[-1]) < 0.04
        np.testing.assert_array_equal(maps.mel, pretrained.band_centres)
        assert torch.equal(torch.from_numpy(maps.features.values), features)
        assert maps.token.values.tolist() == pretrained.tokens(ids)
        assert maps.token.values[-1] in SPECIAL_TOKENS and drop_special_tokens(maps).sizes["token"] == len(ids) - 1
        assert maps.hypothesis == pretrained.text(ids) and maps.setting == self.DIRECTIONS[0]

    def test_scores_equal_those_of_its_network_with_masked_inputs(self, pretrained, maps, utterances):
        audio, prompt = utterances[1].audio(), pretrained.prompt(self.DIRECTIONS[0])
        (ids,) = pretrained.generate(pretrained.features(audio)[None], self.DIRECTIONS[0])
        forced, first = torch.cat([prompt, ids[:-1]]), len(prompt) - 1
        inputs, network = self.own(pretrained, audio), pretrained.network
        original = log_p(network, inputs, forced)[first:]
        for place in ("input", "encoder"):
            masks = masks_of(maps, place)
            levels, hidden = masks.draw(0, masks.number)
            for number in (0, 4, 7):
                cells = torch.from_numpy(hidden[number][masks.partition.labels[levels[number]]])
                own = {name: value.clone() for name, value in inputs.items()}
                if place == "input":
                    self.framed(pretrained, own)[: len(cells)][cells] = 0.0  # a view of the inputs
                    perturbed = log_p(network, own, forced)
                else:
                    with torch.inference_mode():
                        states = network.get_encoder()(**own).last_hidden_state
                        states[:, : len(cells)][:, cells] = 0.0
                        output = network(encoder_outputs=(states,), decoder_input_ids=forced[None], use_cache=False)
                    perturbed = output.logits[0].double().log_softmax(-1)
                expected = functional.kl_div(perturbed[first:], original, log_target=True, reduction="none").sum(-1)
                assert expected.max() > 1e-3
                np.testing.assert_allclose(maps[f"{place}_scores"][number], expected, rtol=1e-3, atol=1e-5)

    def test_maps_can_be_correlated_deleted_and_drawn(self, pretrained, maps, utterances, tmp_path):
        for saliency in (maps.input_saliency, maps.encoder_saliency):
            assert all(np.isfinite(rho).all() for rho in correlate(maps.cross_attention, saliency).values())
        curves = deletion_curves(pretrained, [maps.assign_attrs({KEY: "k"})], ["CA", "SM^X 2d_avg"], tmp_path)
        assert len(curves) == 2 * len(percentages())
        assert (curves[curves.percent == 0].hypothesis == maps.hypothesis).all()
        assert curves[curves.percent == 100].hypothesis.nunique() == 1
        panel = heatmaps(maps, utterances[1].words).axes[3].images[0]
        assert panel.get_array().shape == (maps.sizes["token"] - 1, maps.sizes["step"])

    def test_bfloat16_approximates_the_scores_of_float32(self, pretrained, maps, utterances, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})  # torch emulates it if not
        rounded = quietly(pretrained, utterances[1], self.DIRECTIONS[0], precision="bfloat16")
        for name in ("input_scores", "encoder_scores"):
            assert not np.array_equal(rounded[name], maps[name])
            assert np.corrcoef(rounded[name].values.ravel(), maps[name].values.ravel())[0, 1] > 0.95

    def test_layers_are_named_from_the_output_to_the_input(self, pretrained, maps):
        layers, decoder = layers_from_output(pretrained), maps.sizes["layer"]
        numbers = [int(name.rpartition(".")[2]) for name in layers]
        assert numbers == [*reversed(range(decoder)), *reversed(range(len(layers) - decoder))]
        assert ["decoder" in name for name in layers] == [number < decoder for number in range(len(layers))]
        assert len(layers) > decoder and all(pretrained.network.get_submodule(name) for name in layers)

    def test_maps_are_the_same_each_time(self, pretrained, folder, maps, utterances):
        again = quietly(load_model(folder), utterances[1], self.DIRECTIONS[0])
        assert without_seconds(again).identical(without_seconds(maps))

    def test_a_pickled_model_gives_the_same_maps(self, pretrained, maps, utterances):
        copy = pickle.loads(pickle.dumps(pretrained))  # which has explained `maps`
        assert (copy.name, copy.weights_hash) == (pretrained.name, pretrained.weights_hash)
        found = quietly(copy, utterances[1], self.DIRECTIONS[0])
        assert without_seconds(found).identical(without_seconds(maps))

    def test_threads_can_share_a_model(self, pretrained, maps, utterances, monkeypatch):
        usual, seen, decode = pretrained.config._attn_implementation, set(), pretrained.decode
        assert usual == self.ATTENTION

        def watched(*arguments):
            seen.add(pretrained.config._attn_implementation)
            return decode(*arguments)

        monkeypatch.setattr(pretrained, "decode", watched)
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(quietly, pretrained, utterances[1], self.DIRECTIONS[0]) for _ in range(6)]
        assert seen == {usual} and pretrained.config._attn_implementation == usual
        for job in jobs:
            np.testing.assert_array_equal(job.result().cross_attention, maps.cross_attention)
            np.testing.assert_allclose(job.result().encoder_scores, maps.encoder_scores, rtol=1e-4, atol=1e-6)

    def test_the_hash_depends_on_the_contents_and_not_on_their_layout(self, pretrained, folder, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        pretrained.network.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
        for file in tmp_path.glob("parts/model*"):
            shutil.copy(file, copy)
        assert len(list(copy.glob("model-*.safetensors"))) > 1
        assert load_model(copy).weights_hash == pretrained.weights_hash
        for file in copy.glob("model*"):
            file.unlink()
        name = next(name for name in sorted(tensors) if name.endswith("fc1.bias"))
        tensors[name][3] += 0.01
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        assert load_model(copy).weights_hash != pretrained.weights_hash

    @pytest.mark.parametrize(
        ("broken", "sentence"),
        [
            (lambda path: path.unlink(), "has no model.safetensors: use a revision that has it"),
            (lambda path: path.write_bytes(path.read_bytes()[:-7]), "A safetensors file of .* is damaged"),
            (lambda path: drop(path, "fc1.bias"), r"lack .*layers.0.*fc1.bias, .*: download or train the model again"),
            (
                lambda path: (path.parent / "preprocessor_config.json").unlink(),
                "cannot be read .*download the complete model",
            ),
            (lambda path: vocabulary(path.parent).unlink(), "download the complete model"),
            (lambda path: vocabulary(path.parent).write_bytes(b"{"), "cannot be read .*download the complete model"),
        ],
    )
    def test_an_incomplete_folder_raises(self, folder, tmp_path, broken, sentence):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        broken(copy / "model.safetensors")
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
            load_model(copy)
        assert "\n" not in str(error.value)

    def test_unusable_audio_raises(self, pretrained):
        for audio in (np.zeros(16000, dtype=np.float32), np.full(16000, np.nan), np.ones((16000, 2)), np.ones(10)):
            with pytest.raises(ValueError, match="The audio given"):
                pretrained.features(audio)


def vocabulary(folder):
    """The file with the tokenizer's subwords."""
    return next(folder / name for name in ("sentencepiece.bpe.model", "tokenizer.json") if (folder / name).exists())


def drop(path, ending):
    """Remove the first two tensors of a file whose names have this ending."""
    tensors = load_file(path)
    for name in [name for name in sorted(tensors) if name.endswith(ending)][:2]:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
