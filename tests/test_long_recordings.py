from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import xattn
from xattn.attribution import settings as module
from xattn.attribution.settings import Occlusion, check_memory, fitting_batch
from xattn.audio import SAMPLE_RATE
from xattn.data.pauses import SHORTEST, cut_at_pauses
from xattn.maps import frames_of_steps, shifted
from xattn.models.errors import NothingToExplain

FEW = Occlusion(12, 10, precision="float32", reliability=1.0)


def speech(*parts):
    """Noise of the given seconds, with 0.5 s of faint noise after each part but the last."""
    generator = np.random.default_rng(0)
    pieces = []
    for number, seconds in enumerate(parts):
        if number:
            pieces.append(0.001 * generator.standard_normal(SAMPLE_RATE // 2))
        pieces.append(0.1 * generator.standard_normal(round(seconds * SAMPLE_RATE)))
    return np.concatenate(pieces).astype(np.float32)


def test_a_recording_is_cut_in_its_pauses():
    parts = cut_at_pauses((SAMPLE_RATE, speech(7.0, 1.0, 8.0, 3.0)), 10.0, language="en")
    # Pauses are at 7.0, 8.5 and 17.0 s; each cut is as late as the level is lowest within 5 to 10 s of the last one.
    edges = [part.start for part in parts]
    assert len(parts) == 3 and 7.15 <= edges[1] <= 9.0 and 17.0 <= edges[2] <= 17.5
    assert parts[-1].end == 20.5 and {part.language for part in parts} == {"en"}


def test_a_short_recording_stays_whole():
    (part,) = cut_at_pauses((SAMPLE_RATE, speech(3.0)))
    assert (part.start, part.end, part.duration) == (0.0, 3.0, 3.0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.2, 9.0), min_size=1, max_size=6),
    st.floats(2.0, 12.0),
)
def test_parts_are_the_whole_recording(seconds, longest):
    whole = speech(*seconds)
    parts = cut_at_pauses((SAMPLE_RATE, whole), longest)
    np.testing.assert_array_equal(np.concatenate([part.samples for part in parts]), whole)
    assert all(part.duration <= longest + 0.01 for part in parts)
    assert len(parts) == 1 or min(part.duration for part in parts) >= SHORTEST - 0.02
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert len({part.id for part in parts}) == len(parts)


def test_parts_shorter_than_two_seconds_are_refused():
    with pytest.raises(ValueError, match=r"^longest is 1\.5: give at least 2 seconds\.$"):
        cut_at_pauses((SAMPLE_RATE, speech(3.0)), 1.5)


def test_maps_of_a_part_have_the_times_of_the_whole(model, tmp_path):
    path = tmp_path / "talk.wav"
    soundfile.write(path, speech(3.0, 3.0), SAMPLE_RATE, subtype="FLOAT")
    first, second = cut_at_pauses(path, 4.0, language="en")
    assert second.id == f"talk-{second.start:07.2f}" and second.start > 3.0
    maps = xattn.explain(model, second, occlusion=FEW, progress=False)
    samples = xattn.explain(
        model, second.samples, rate=SAMPLE_RATE, language="en", occlusion=FEW, progress=False, text=maps.hypothesis
    )
    for name in ("time", "step", "step_start", "step_end"):
        np.testing.assert_allclose(maps[name], samples[name] + second.start)
    assert maps.time.attrs == samples.time.attrs
    np.testing.assert_array_equal(
        frames_of_steps(maps, maps.time.values), frames_of_steps(samples, samples.time.values)
    )
    back = shifted(maps, -second.start)
    rho, same = (xattn.correlate(each.cross_attention, each.input_saliency) for each in (maps, back))
    np.testing.assert_allclose(rho.overall, same.overall)
    assert first.start == 0.0
    xattn.explain_corpus(model, [first, second], tmp_path / "maps", occlusion=FEW, progress=False)
    for part, stored in zip((first, second), xattn.load_maps(tmp_path / "maps", "tiny", "en"), strict=True):
        assert stored.time.values[0] == pytest.approx(part.start + 0.0125)


def test_a_recording_that_does_not_fit_into_memory_is_refused_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(model, "encode", lambda *_: pytest.fail("something was computed"))
    monkeypatch.setattr(module, "free_bytes", lambda device: 3_000_000_000)
    with pytest.raises(NothingToExplain) as error:
        xattn.explain(model, speech(600.0), rate=SAMPLE_RATE, language="en", occlusion=FEW, progress=False)
    needed = module.needed_bytes(model, 59_998, 80, 16)
    assert needed > 7.2e9  # four arrays of two heads and 15,000 x 15,000 steps
    assert str(error.value).startswith("recording-") and str(error.value).endswith(
        f" lasts 600 s, which needs about {needed / 1e9:.0f} GB of memory with tiny, and 3 GB are free: cut it with "
        "xattn.cut_at_pauses, or use a machine with more memory."
    )


def test_what_fits_is_not_refused(model):
    check_memory(model, torch.zeros(300, 80), "short")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 9_000),
        ({"max": "max", "current": "4000", "stat": "anon 1\ninactive_file 500\n"}, 9_000),
        ({"max": "20000", "current": "4000", "stat": "anon 1\ninactive_file 500\n"}, 9_000),
        ({"max": "6000", "current": "4000", "stat": "anon 1\ninactive_file 500\nactive_file 7\n"}, 2_500),
        ({"max": "6000", "current": "4000", "stat": "anon 1\n"}, 9_000),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, files, free):
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(module, "CONTAINER", tmp_path)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=9_000))
    assert module.free_bytes(torch.device("cpu")) == free


@pytest.mark.parametrize(("free", "batch"), [(10**12, 32), (10**8, 20), (10**6, 1)])
def test_the_batch_follows_from_length_and_free_memory(model, monkeypatch, free, batch):
    monkeypatch.setattr(module, "free_bytes", lambda device: free)
    monkeypatch.setattr(model, "pass_bytes", lambda frames, tokens: frames * tokens * 100)
    assert fitting_batch(model, 300, 20, 32) == batch  # 600 kB a pass, an eighth of the memory


def test_the_batch_of_a_long_recording_is_smaller(model, utterances, monkeypatch):
    batches = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda features: batches.append(len(features)) or encode(features))
    monkeypatch.setattr(module, "CELL_ARRAYS", 0)  # for a model as small as this, the map takes more than a pass
    monkeypatch.setattr(module, "free_bytes", lambda device: 8 * 3 * model.pass_bytes(57, 7) + 8)
    xattn.explain(model, utterances[0], occlusion=FEW, progress=False)
    assert max(batches) in (2, 3)


@pytest.mark.parametrize("seconds", [10, 60])
def test_the_estimate_of_a_pass_is_an_upper_bound_of_the_right_size(model, seconds):
    """Against the largest tensor that a pass makes, of which several live at once."""

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.bytes = max(self.bytes, result.nbytes)
            return result

    frames = 100 * seconds
    with torch.inference_mode(), Largest() as seen:
        model.network.encoder(torch.zeros(1, frames, 80))
    assert 1.0 <= model.pass_bytes(frames, 10) / seen.bytes <= 12
