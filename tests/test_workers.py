"""Utterances explained by Dask workers."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import dask
import distributed
import platformdirs
import pytest
import torch
import xarray as xr

from xattn import Occlusion, explain_corpus, load_maps
from xattn.workers import ENVIRONMENT, connect

SMALL = Occlusion(input_masks=12, encoder_masks=10, batch_size=5, precision="float32")


def test_without_workers_this_process_is_used():
    for where in (None, ""):
        with connect(where) as client:
            assert client is None


@pytest.mark.parametrize("where", ["two", "0", "slurm:", "slurm:many", "-1", "tcp://localhost", "foo://localhost:1"])
def test_invalid_workers_are_an_error(where):
    with pytest.raises(ValueError, match=r"^WORKERS is '.*': give the address of a Dask scheduler such as tcp:"):
        connect(where).__enter__()


def test_scheduler_that_does_not_answer_is_an_error():
    with pytest.raises(OSError, match="No Dask scheduler answers at tcp://127.0.0.1:9: start one there"):
        connect("tcp://127.0.0.1:9").__enter__()


@pytest.fixture
def jobs(monkeypatch):
    """Calls of a replacement of SLURMCluster that has no workers."""
    jobqueue, calls = pytest.importorskip("dask_jobqueue"), []

    class Cluster(distributed.LocalCluster):
        def __init__(self, *arguments, **options):
            calls.append((arguments, options, self))
            super().__init__(n_workers=0, processes=False, dashboard_address=None)

        def scale(self, n=None, jobs=None):
            calls.extend([jobs] if jobs else [])  # closing scales to no workers

    monkeypatch.setattr(jobqueue, "SLURMCluster", Cluster)
    return calls


def test_slurm_cluster_uses_its_configuration_and_the_given_number_of_jobs(jobs):
    with connect("slurm:3") as client:
        (arguments, options, cluster), scaled = jobs
        assert (arguments, options.keys(), scaled) == ((), {"log_directory"}, 3)
        assert client.scheduler.address == cluster.scheduler_address
    assert cluster.status == distributed.Status.closed and client.status == "closed"


def test_logs_of_slurm_jobs_go_to_the_user_cache_unless_jobqueue_yaml_names_a_folder(jobs, user_cache, tmp_path):
    for configured, expected in ((None, user_cache / "xattn" / "slurm"), (str(tmp_path / "logs"), tmp_path / "logs")):
        jobs.clear()
        with dask.config.set({"jobqueue.slurm.log-directory": configured}), connect("slurm:1"):
            assert jobs[0][1] == {"log_directory": str(expected)}
    assert (user_cache / "xattn" / "slurm").is_dir() and not (tmp_path / "logs").exists()  # SLURMCluster makes it


def test_folder_of_logs_that_cannot_be_made_is_named(jobs, monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    with pytest.raises(
        OSError, match=r"cache/slurm could not be written, because .*/cache is a file where a folder is"
    ):
        connect("slurm:1").__enter__()


def test_cluster_is_closed_if_its_scheduler_does_not_answer(jobs, monkeypatch):
    def silent(*arguments, **options):
        raise TimeoutError

    monkeypatch.setattr(distributed, "Client", silent)
    with pytest.raises(OSError, match="No Dask scheduler answers at slurm:3: start one there, or change WORKERS"):
        connect("slurm:3").__enter__()
    assert jobs[0][2].status == distributed.Status.closed


def test_workers_give_the_maps_of_one_process(model, utterances, tiny_folder, tmp_path, capsys, monkeypatch):
    options = {"translate_to": ["en", "it"], "occlusion": SMALL}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads affects rounding
    try:
        explain_corpus(model, utterances, tmp_path / "one", **options)
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # one thread for each worker, even if it is restarted
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "source", os.path.relpath(tiny_folder))
    relative = [replace(u, audio_path=Path(os.path.relpath(u.audio_path)), manifest=None) for u in utterances]
    with connect("2") as client:
        assert list(client.run(torch.get_num_threads).values()) == [1, 1]
        client.run(os.chdir, "/")
        client.run(_dies_once, str(tmp_path / "died"))
        explain_corpus(model, relative, "two", workers=client, **options)
        assert (tmp_path / "died").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[-1].startswith("tiny en+en-it 2/2 ") and lines[-1].endswith(" 0 s left")
    for direction in ("en", "en-it"):
        runs = [list(load_maps(tmp_path / folder, "tiny", direction)) for folder in ("one", "two")]
        assert [maps.utterance for maps in runs[1]] == [utterance.id for utterance in utterances]
        for one, two in zip(*runs, strict=True):
            xr.testing.assert_identical(one.assign_attrs(seconds=None), two.assign_attrs(seconds=None))


@pytest.mark.parametrize("own", [None, "65536"])
def test_workers_have_their_environment_unless_the_user_has_set_it(monkeypatch, own):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False) if own is None else monkeypatch.setenv(name, own)
    with connect("1") as client:
        for name, expected in ENVIRONMENT.items():
            assert list(client.run(os.getenv, name).values()) == [own or expected]


def _dies_once(flag):
    """Kill the worker that is the first to save an utterance, before it is written."""
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
