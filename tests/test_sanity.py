"""Sanity of maps: models with shuffled weights, and maps of an imitated model whose important cells are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from reproduction.sanity import randomisation
from xattn import Occlusion
from xattn.analysis.sanity import layers_from_output, planted_auc, randomised
from xattn.attribution.occlusion import Masks, Partition
from xattn.attribution.segments import WINDOWS, time_windows

DECODER = ["decoder.layers.1", "decoder.layers.0"]
ENCODER = ["encoder.conformer_layers.1", "encoder.conformer_layers.0"]


def part(**modules):
    module = nn.Module()
    for name, each in modules.items():
        module.add_module(name, each)
    return module


def layers(number):
    return nn.ModuleList([nn.Linear(2, 2) for _ in range(number)])


def test_layers_from_output(model):
    found = layers_from_output(model)
    assert found == [*DECODER, *ENCODER]  # the encoder also has a list of convolutions
    assert all(isinstance(model.network.get_submodule(name), nn.Module) for name in found)


def test_layers_of_other_architectures():
    whisper = part(model=part(encoder=part(layers=layers(2)), decoder=part(layers=layers(3))))
    found = layers_from_output(SimpleNamespace(network=whisper))
    assert found == [f"model.decoder.layers.{n}" for n in (2, 1, 0)] + [f"model.encoder.layers.{n}" for n in (1, 0)]
    encoder = part(encoder=part(layers=layers(3)), adapter=part(layers=layers(1)))  # the adapter is left out
    seamless = part(speech_encoder=encoder, text_decoder=part(layers=layers(2)))
    found = layers_from_output(SimpleNamespace(network=seamless))
    assert found == [
        *("text_decoder.layers.1", "text_decoder.layers.0"),
        *(f"speech_encoder.encoder.layers.{n}" for n in (2, 1, 0)),
    ]


def weights(model):
    return {name: value.clone() for name, value in model.network.named_parameters()}


def test_named_layers_are_shuffled_and_nothing_else(model):
    before = weights(model)
    changed = randomised(model, DECODER[:1])
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name
    moved = 0
    for name, value in weights(changed).items():
        if name.startswith(DECODER[0] + "."):
            assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values), name
            moved += not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name
    constant = sum(bool((value == value.flatten()[0]).all()) for name, value in before.items() if DECODER[0] in name)
    assert moved + constant == sum(DECODER[0] in name for name in before) and moved > 5


def test_shuffled_weights_change_outputs_and_hash(model, utterances):
    features = model.features(utterances[1].audio())[None]
    ids = torch.tensor([4, 20, 21, 22])
    states = model.encode(features)
    expected = model.decode(states, ids)
    decoder, everything = randomised(model, DECODER), randomised(model, [*DECODER, *ENCODER])
    assert (decoder.decode(states, ids) - expected).abs().max() > 0.1
    assert torch.equal(decoder.encode(features), states)  # the encoder is as it was
    assert (everything.encode(features) - states).abs().max() > 0.1
    torch.testing.assert_close(randomised(model, []).decode(states, ids), expected)
    others = [decoder, everything, randomised(model, DECODER, seed=1)]
    assert len({model.weights_hash, *(each.weights_hash for each in others)}) == 4


def test_the_seed_decides_the_order_of_the_weights(model):
    first, same, other = (weights(randomised(model, DECODER, seed)) for seed in (0, 0, 1))
    name = f"{DECODER[0]}.fc1.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_maps_change_while_more_layers_are_random(model, utterances):
    occlusion = Occlusion(60, 60, precision="float32", reliability=1.0)
    table = randomisation(model, utterances, "en", [*DECODER, *ENCODER], occlusion)
    assert table.columns.tolist() == ["randomised", "layer", "map", "value", "low", "high", "n"]
    assert table["map"].tolist() == ["CA", "SM^X", "SM^H"] * 5 and set(table.n) == {2}
    assert table.layer.tolist() == [layer for layer in ["", *DECODER, *ENCODER] for _ in range(3)]
    attention = table[table["map"] == "CA"].value.tolist()
    assert attention[0] == pytest.approx(1) and max(attention[1:]) < 0.99
    own = table[table.randomised == 0].set_index("map").value
    assert (own[["SM^X", "SM^H"]] < 1).all() and own["SM^H"] > 0.3  # other masks
    last = table[table.randomised == 4].set_index("map").value
    assert (last < own).all() and last.abs().max() < 0.7


@pytest.fixture(scope="module")
def features():
    """A smooth spectrogram of 1.2 s."""
    rng = np.random.default_rng(0)
    time, mel = np.meshgrid(np.arange(120), np.arange(80), indexing="ij")
    waves = sum(rng.normal() * np.sin(rng.uniform(0, 0.2) * time + rng.uniform(0, 0.2) * mel) for _ in range(20))
    return (waves + 0.1 * rng.normal(size=waves.shape)).astype(np.float32)


def rectangle(time, mel):
    truth = np.zeros((120, 80), dtype=bool)
    truth[time, mel] = True
    return truth


def test_windows_find_whole_windows_exactly(features):
    frames = round(max(WINDOWS) * 100)
    truth = rectangle(slice(frames, 2 * frames), slice(None))
    assert planted_auc(features, truth, "windows", 600) == 1.0
    assert planted_auc(features, truth, "windows", 600, "sqrt_ridge") == 1.0


def test_windows_find_the_time_but_not_the_bands(features):
    truth = rectangle(slice(40, 80), slice(20, 40))
    found = planted_auc(features, truth, "windows", 600)
    # Cells outside the time are below, those of other bands at the same time are equal: 0.5 of 40 x 60 cells.
    outside, same = 80 * 80, 40 * 60
    assert found == pytest.approx((outside + 0.5 * same) / (outside + same), abs=1e-9)
    assert 0.5 < found < 0.9


def test_superpixels_find_the_cells_with_enough_masks(features):
    truth = rectangle(slice(40, 80), slice(20, 40))
    few, many = (planted_auc(features, truth, "superpixels", number) for number in (30, 1500))
    assert few < many - 0.1 and many > 0.97
    assert many > planted_auc(features, truth, "windows", 1500) + 0.08


def test_area_of_a_small_case_by_hand():
    """The map is the mean score of the masks that hid a cell; the area counts pairs of cells in the right order."""
    features = np.random.default_rng(1).normal(size=(60, 3)).astype(np.float32)
    truth = np.zeros(features.shape, dtype=bool)
    truth[13:27, 1:] = True
    labels = time_windows(60, 3, 0.01)
    levels, hidden = Masks(Partition.of(labels), 50, 0.5, 0, "planted").draw(0, 50)
    total, times = np.zeros((60, 3)), np.zeros((60, 3))
    for level, row in zip(levels, hidden, strict=True):
        cells = row[labels[level] + sum(each.max() + 1 for each in labels[:level])]
        total[cells] += cells[truth].mean() ** 2
        times += cells
    saliency = total / times
    first, second = saliency[truth][:, None], saliency[~truth][None]
    area = np.mean((first > second + 1e-12) + 0.5 * (abs(first - second) <= 1e-12))
    assert planted_auc(features, truth, "windows", 50) == pytest.approx(area)
    assert 0.6 < area < 1
