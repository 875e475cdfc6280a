"""Maps on disk: round trips, keys, interruption, damage, the list of utterances, and checkpoints."""

import os
import resource
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import platformdirs
import pytest
import xarray as xr

from xattn import store
from xattn.analysis.correlation import correlate
from xattn.analysis.faithfulness import load_texts, save_texts


@pytest.fixture
def path(tmp_path):
    return store.path_of(tmp_path, "tiny", "en", "made-1")


def visible(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*/[!.]*"))


def test_round_trip(made, path, tmp_path):
    maps = made.maps()
    store.save(maps, path, "key-1")
    loaded = store.load(path)
    assert loaded.attrs.pop("key") == "key-1"
    xr.testing.assert_identical(loaded, maps)
    assert all(loaded[name].dtype == maps[name].dtype for name in maps.variables)
    for saliency in ("input_saliency", "encoder_saliency"):
        expected = correlate(maps.cross_attention, maps[saliency])
        xr.testing.assert_identical(correlate(loaded.cross_attention, loaded[saliency]), expected)
    assert visible(tmp_path) == ["tiny/en/made-1.zarr.zip"]
    assert os.listdir(path.parent) == ["made-1.zarr.zip"]


@pytest.mark.parametrize("estimator", ["mean", "sqrt_ridge"])
def test_scores_and_halves_survive_a_round_trip(made, path, estimator):
    maps = made.scored(estimator=estimator)
    store.save(maps, path, "key-1")
    loaded = store.load(path).drop_attrs(deep=False)
    xr.testing.assert_identical(loaded, maps.drop_attrs(deep=False))
    for place in ("input", "encoder"):
        assert loaded[f"{place}_halves"].dims == ("half", "token", "step") and loaded.sizes[f"{place}_mask"] == 60


def test_stored_form_is_compact(made, path):
    store.save(made.maps(), path, "key-1")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert "segment_score/.zarray" in names and not any("input_saliency" in name for name in names)
    maps = made.maps()
    cell = {"time": 5, "mel": 3}
    units = maps.segmentation.isel(cell).values
    expected = maps.segment_score.values[:, units].sum(axis=1) / maps.segment_count.values[units].sum()
    np.testing.assert_allclose(store.load(path).input_saliency.isel(cell), expected, rtol=1e-12)


def test_maps_without_superpixels_are_stored_cell_by_cell(made, path):
    maps = made.maps().drop_vars(["segmentation", "segment_score", "segment_count", "features"])
    maps["input_saliency"] = maps.input_saliency.astype(np.float32)
    store.save(maps.assign_attrs(input_reliability=np.nan), path, "key-1")
    loaded = store.load(path)
    assert np.isnan(loaded.attrs.pop("input_reliability")) and loaded.attrs.pop("key") == "key-1"
    del maps.attrs["input_reliability"]
    xr.testing.assert_identical(loaded, maps)
    assert loaded.input_saliency.dtype == np.float32


def test_keys(made, path):
    assert not store.is_current(path, "key-1")
    store.save(made.maps(), path, "key-1")
    assert store.is_current(path, "key-1")
    assert not store.is_current(path, "key-2")
    parameters = {"seed": 0, "p": 0.5, "audio": "abc"}
    assert store.key_of(parameters) == store.key_of(dict(reversed(parameters.items())))
    changes = ({}, {"seed": 1}, {"p": 0.25}, {"audio": "abd"}, {"new": 0})
    assert len({store.key_of(parameters | change) for change in changes}) == 5


def test_maps_are_replaced_completely(made, path):
    store.save(made.maps(seed=0), path, "key-1")
    shorter = made.maps(seed=1, tokens=("▁a", "▁b", "</s>"), frames=10)
    store.save(shorter, path, "key-2")
    loaded = store.load(path)
    assert loaded.attrs.pop("key") == "key-2"
    xr.testing.assert_identical(loaded, shorter)
    assert os.listdir(path.parent) == ["made-1.zarr.zip"]


def interrupt_writing(monkeypatch):
    write = xr.Dataset.to_zarr

    def interrupted(self, *arguments, **keywords):
        write(self[["features"]], *arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.Dataset, "to_zarr", interrupted)


def interrupt_renaming(monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        if str(target).endswith("made-1.zarr.zip"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)


@pytest.mark.parametrize("interrupt", [interrupt_writing, interrupt_renaming])
def test_interruption_leaves_nothing_visible(made, path, tmp_path, monkeypatch, interrupt):
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            store.save(made.maps(), path, "key-1")
    assert visible(tmp_path) == []
    assert not store.is_current(path, "key-1")
    with pytest.raises(FileNotFoundError):
        store.load_maps(tmp_path, "tiny", "en")
    store.save(made.maps(), path, "key-1")
    assert store.is_current(path, "key-1") and os.listdir(path.parent) == ["made-1.zarr.zip"]


@pytest.mark.parametrize("interrupt", [interrupt_writing, interrupt_renaming])
def test_interruption_keeps_older_maps(made, path, tmp_path, monkeypatch, interrupt):
    old, new = made.maps(seed=0), made.maps(seed=1)
    store.save(old, path, "key-1")
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            store.save(new, path, "key-2")
    loaded = store.load(path)
    assert loaded.attrs.pop("key") == "key-1"
    xr.testing.assert_identical(loaded, old)
    store.save(new, path, "key-2")
    assert store.load(path).key == "key-2"


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "folder", "other zip"])
def test_damaged_file_is_an_error(made, path, damage):
    store.save(made.maps(), path, "key-1")
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "not a store")
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not a store"}[damage])
    for call in (store.load, lambda path: store.is_current(path, "key-1")):
        with pytest.raises(ValueError, match=r"made-1\.zarr\.zip holds no readable maps .*: delete it and make"):
            call(path)


def test_no_flipped_byte_changes_a_number(made, path):
    maps = made.maps()
    store.save(maps, path, "key-1")
    whole = bytearray(path.read_bytes())
    reported = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 200):
        flipped = whole.copy()
        flipped[place] ^= 1 << int(place) % 8
        path.write_bytes(flipped)
        try:
            loaded = store.load(path)
        except ValueError as error:
            assert "holds no readable maps" in str(error) and "\n" not in str(error)
            reported += 1
        else:  # a time stamp or a flag of the archive
            xr.testing.assert_identical(loaded.drop_attrs(), maps.drop_attrs())
    assert reported > 100


def test_maps_of_the_last_run_are_loaded_in_its_order(made, tmp_path):
    for number in (10, 2, 1):
        name = f"en-{number:04d}"
        maps = made.maps(seed=number, utterance=name)
        store.save(maps, store.path_of(tmp_path, "tiny", "en", name), "key")
    store.save(made.maps(), store.path_of(tmp_path, "tiny", "en-it", "other"), "key")
    store.save(made.maps(), store.path_of(tmp_path, "base", "en", "other"), "key")
    store.save_index(dict.fromkeys(["en-0002", "en-0010"], "key"), tmp_path, "tiny", "en")
    loaded = list(store.load_maps(tmp_path, "tiny", "en"))
    assert [(maps.utterance, maps.seed) for maps in loaded] == [("en-0002", 2), ("en-0010", 10)]
    store.save_index(dict.fromkeys(["en-0010", "en-0001", "en-0002"], "key"), tmp_path, "tiny", "en")
    assert [maps.seed for maps in store.load_maps(tmp_path, "tiny", "en")] == [10, 1, 2]
    store.save(made.maps(), store.path_of(tmp_path, "tiny", "en", "en-0001"), "another")
    with pytest.raises(ValueError, match=r"en-0001.* was made under other parameters than the last finished run: make"):
        list(store.load_maps(tmp_path, "tiny", "en"))
    store.path_of(tmp_path, "tiny", "en", "en-0001").unlink()
    with pytest.raises(FileNotFoundError, match=r"en-0001\.zarr\.zip is missing: make the maps again"):
        list(store.load_maps(tmp_path, "tiny", "en"))


def test_missing_maps_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no maps of tiny for the direction it in .*: make them"):
        store.load_maps(tmp_path, "tiny", "it")


def test_checkpoint_holds_scores_under_its_key(tmp_path):
    path = tmp_path / "tiny" / "en" / "made-1.partial.npz"
    scores = np.arange(6.0).reshape(3, 2)
    checkpoint = store.Checkpoint(path, "key-1")
    assert checkpoint.scores == {}
    checkpoint.save("input", scores)
    ((name, values),) = store.Checkpoint(path, "key-1").scores.items()
    assert name == "input" and np.array_equal(values, scores)
    assert store.Checkpoint(path, "key-2").scores == {}
    assert os.listdir(path.parent) == ["made-1.partial.npz"]
    path.write_bytes(path.read_bytes()[:100])
    assert store.Checkpoint(path, "key-1").scores == {}


def test_tests_leave_no_scores_in_the_user_s_cache(tmp_path_factory):
    assert platformdirs.user_cache_path("xattn").is_relative_to(tmp_path_factory.getbasetemp())


@contextmanager
def small_files():
    """Limit files to a kilobyte, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_checkpoint_that_cannot_be_written_is_reported_once(tmp_path, capsys):
    path, few, many = tmp_path / "made-1.partial.npz", np.ones((3, 2)), np.ones((999, 2))
    checkpoint = store.Checkpoint(path, "key-1")
    checkpoint.save("input", few)
    with small_files():
        checkpoint.save("input", many)
        checkpoint.save("input", many)
    (line,) = capsys.readouterr().out.splitlines()
    assert "made-1.partial.npz could not be written (File too large): make room" in line
    assert os.listdir(tmp_path) == ["made-1.partial.npz"]
    assert np.array_equal(store.Checkpoint(path, "key-1").scores["input"], few)
    checkpoint.save("input", many)
    assert np.array_equal(store.Checkpoint(path, "key-1").scores["input"], many)


def test_scores_with_a_flipped_bit_are_correct_or_absent(tmp_path):
    path, scores = tmp_path / "made-1.partial.npz", np.arange(60.0).reshape(30, 2)
    store.Checkpoint(path, "key-1").save("input", scores)
    whole, absent = bytearray(path.read_bytes()), 0
    for place, bit in enumerate(np.random.default_rng(0).integers(0, 8, len(whole))):
        flipped = whole.copy()
        flipped[place] ^= 1 << int(bit)
        path.write_bytes(flipped)
        found = store.Checkpoint(path, "key-1").scores
        absent += not found
        assert not found or np.array_equal(found.pop("input"), scores) and not found
    assert absent > len(whole) / 2


def test_old_temporary_files_are_removed(made, path):
    for kind, age in (("old", 7200), ("young", 60)):
        group = path.with_name(f".{path.name}.{kind}.part.zarr")
        file, other = path.with_name(f".{path.name}.{kind}.part"), path.with_name(f".made-2.zarr.zip.{kind}.part")
        group.mkdir(parents=True)
        (group / "chunk").touch()
        for left in (file, other, group):
            left.exists() or left.touch()
            os.utime(left, (time.time() - age,) * 2)
    store.save(made.maps(), path, "key-1")
    assert sorted(left.name for left in path.parent.iterdir()) == [
        ".made-1.zarr.zip.young.part",
        ".made-1.zarr.zip.young.part.zarr",
        ".made-2.zarr.zip.old.part",
        ".made-2.zarr.zip.young.part",
        "made-1.zarr.zip",
    ]


@pytest.mark.parametrize(
    "index", ["", "{half", "[]", '{"made-1": 1}', '{"made-1": {"reference": "a"}}', "null", "\xff"]
)
def test_damaged_list_of_utterances_is_an_error(made, path, tmp_path, index):
    store.save(made.maps(), path, "key-1")
    (path.parent / store.INDEX).write_bytes(index.encode("latin-1"))
    with pytest.raises(ValueError, match=r"utterances\.json holds no readable list of .*: delete it and make the maps"):
        store.load_maps(tmp_path, "tiny", "en")


def test_run_that_skipped_every_utterance_is_an_error(tmp_path):
    store.save_index({}, tmp_path, "tiny", "en")
    with pytest.raises(ValueError, match=r"utterances\.json lists no utterance, because all were skipped: explain"):
        store.load_maps(tmp_path, "tiny", "en")


def test_references_of_the_last_run_replace_those_of_the_maps(made, path, tmp_path):
    store.save(made.maps().assign_attrs(reference="the dgo"), path, "key-1")
    for references, expected in ((None, "the dgo"), ({"made-1": "the dog"}, "the dog")):
        store.save_index({"made-1": "key-1"}, tmp_path, "tiny", "en", references)
        (maps,) = store.load_maps(tmp_path, "tiny", "en")
        assert maps.reference == expected
    xr.testing.assert_identical(maps, store.load(path).assign_attrs(reference="the dog"))


def test_decoded_texts(tmp_path):
    path = tmp_path / "tiny" / "en" / "deletion.json"
    texts = ["il caffè è", ""]
    assert load_texts(path, "key-1") is None
    save_texts(texts, path, "key-1")
    assert load_texts(path, "key-1") == texts
    assert load_texts(path, "key-2") is None
    assert os.listdir(path.parent) == ["deletion.json"]
    path.write_text("{half")
    with pytest.raises(ValueError, match=r"deletion\.json holds no readable texts .*: delete it and run this again"):
        load_texts(path, "key-1")
