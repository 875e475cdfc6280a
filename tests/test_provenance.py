"""Hashes against those of coreutils, and what they are blind to on purpose."""

import os

import pytest

from xattn.provenance import digest, digest_file, digest_files, used_model, versions


def test_a_file_has_the_hash_of_its_bytes(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"0.5")
    # printf 0.5 | sha256sum
    assert digest_file(path) == "d2cbad71ff333de67d07ec676e352ab7f38248eb69c942950157220607c55e84"


def test_a_value_has_one_hash_whatever_the_order_of_its_keys():
    assert digest({"seed": 0, "p": 0.5}) == digest({"p": 0.5, "seed": 0}) != digest({"p": 0.5, "seed": 1})


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda folder: os.utime(folder / "a.csv", (0, 0)), True),
        (lambda folder: (folder / "README.md").write_text("a card"), True),
        (lambda folder: (folder / "a.csv").write_text("2"), False),
        (lambda folder: (folder / "a.csv").rename(folder / "b.csv"), False),
        (lambda folder: (folder / "sub" / "c.csv").write_text("3"), False),
    ],
    ids=["time", "card", "content", "name", "file below"],
)
def test_what_changes_the_hash_of_a_folder(tmp_path, change, same):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.csv").write_text("1")
    before = digest_files(tmp_path, "**/*")
    change(tmp_path)
    assert (digest_files(tmp_path, "**/*") == before) is same


@pytest.mark.parametrize(
    ("model", "recorded"),
    [
        ("owner/small", "owner/small@" + 40 * "a"),  # the branch main, as the hub's cache keeps it
        ("owner/small@v1", "owner/small@" + 40 * "b"),
        ("owner/small@" + 40 * "b", "owner/small@" + 40 * "b"),
        ("owner/small@v2", "owner/small@v2"),  # which was never fetched
        ("owner/large", "owner/large"),
    ],
)
def test_a_model_of_the_hub_is_recorded_with_its_commit(tmp_path, monkeypatch, model, recorded):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--owner--small"
    (cached / "refs").mkdir(parents=True)
    for name, letter in (("main", "a"), ("v1", "b")):
        (cached / "refs" / name).write_text(40 * letter)
        (cached / "snapshots" / (40 * letter)).mkdir(parents=True)
        (cached / "snapshots" / (40 * letter) / "config.json").write_text("{}")
    assert used_model(tmp_path, model) == recorded


def test_a_model_s_folder_is_recorded_with_its_hash_even_where_it_could_be_an_id(tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "weights").write_text("0.5")
    assert used_model(tmp_path, "models/base") == digest_files(tmp_path / "models/base", "**/*")


def test_versions_are_of_declared_packages_alone():
    found = versions()
    assert found["numpy"] and "torch" in found and "pytest" not in found and len(found) > 15
