"""Utterances on workers of their own."""

import os
import signal

import pytest
import torch
import xarray as xr

from xattn import store
from xattn.explain import Occlusion
from xattn.runs import explain_corpus
from xattn.workers import MEMORY, connect

SMALL = Occlusion(input_masks=12, encoder_masks=10, batch_size=5, precision="float32")


def test_no_workers_are_this_process():
    for where in (None, ""):
        with connect(where) as client:
            assert client is None


@pytest.mark.parametrize("where", ["two", "0", "slurm:", "slurm:many", "-1"])
def test_a_place_that_is_none(where):
    with pytest.raises(ValueError, match=r"^WORKERS is '.*': give the address of a Dask scheduler, a number of"):
        connect(where).__enter__()


def test_nobody_answers():
    with pytest.raises(OSError, match="No Dask scheduler answers at tcp://127.0.0.1:9: start one there"):
        connect("tcp://127.0.0.1:9").__enter__()


def test_workers_give_the_maps_of_one_process(model, utterances, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # their number moves rounding
    try:
        explain_corpus(model, utterances, ["en", "en-it"], tmp_path / "one", SMALL)
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    with connect("2") as client:
        client.run(torch.set_num_threads, 1)
        client.run(_dies_once, str(tmp_path / "died"))
        explain_corpus(model, utterances, ["en", "en-it"], tmp_path / "two", SMALL, client)
        assert (tmp_path / "died").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[-1].startswith("tiny en+en-it 2/2 ") and lines[-1].endswith(" 0 s left")
    for setting in ("en", "en-it"):
        pairs = [list(store.load_all(tmp_path / folder, "tiny", setting)) for folder in ("one", "two")]
        assert [maps.utterance for maps in pairs[1]] == [utterance.id for utterance in utterances]
        for one, two in zip(*pairs, strict=True):
            xr.testing.assert_identical(one.assign_attrs(seconds=None), two.assign_attrs(seconds=None))


@pytest.mark.parametrize(("own", "expected"), [(None, str(2**30)), ("65536", "65536")])
def test_workers_keep_freed_memory_unless_told_otherwise(monkeypatch, own, expected):
    for name in MEMORY:
        monkeypatch.delenv(name, raising=False) if own is None else monkeypatch.setenv(name, own)
    with connect("1") as client:
        for name in MEMORY:
            assert list(client.run(os.getenv, name).values()) == [expected]


def _dies_once(flag):
    """Let the first utterance that any worker saves kill that worker before it is written."""
    from xattn import store

    save = store.save

    def dying(*arguments):
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            save(*arguments)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    store.save = dying
