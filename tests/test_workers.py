"""Utterances explained by Dask workers."""

import os
import shlex
import signal
import sys
import time
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
def jobs(monkeypatch, tmp_path):
    """SLURM's commands are replaced: jobs are files of this folder, submitted.*, and do not run."""
    pytest.importorskip("dask_jobqueue")
    folder = tmp_path / "slurm"
    folder.mkdir()
    copy = f'cp "$1" {folder}/$$.part && mv {folder}/$$.part {folder}/submitted.$$ && echo job $$'
    for name, line in (("sbatch", f'[ "$1" = --test-only ] || {{ {copy}; }}'), ("scancel", "")):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    with dask.config.set({"jobqueue.slurm.cores": 4, "jobqueue.slurm.memory": "8GB"}):
        yield folder


def submitted(jobs, number):
    """The scripts of the submitted jobs, of which there must be so many."""
    deadline = time.monotonic() + 20
    while len(list(jobs.glob("submitted.*"))) < number and time.monotonic() < deadline:
        time.sleep(0.1)
    scripts = [path.read_text() for path in jobs.glob("submitted.*")]
    assert len(scripts) == number
    return scripts


def test_slurm_jobs_have_one_worker_with_all_cores_and_the_configuration_is_kept(jobs, user_cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a folder/bin/python")
    given = {"job-script-prologue": ["module load x"], "job-extra-directives": ["-q y"], "worker-extra-args": ["--z"]}
    given = {f"jobqueue.slurm.{name}": value for name, value in given.items()}
    with dask.config.set(given), connect("slurm:3") as client:
        for script in submitted(jobs, 3):
            assert "#SBATCH --cpus-per-task=4\n" in script and "#SBATCH -q y\n" in script
            assert f'#SBATCH --output="{user_cache}/xattn/slurm/%x-%j.out"\n' in script
            assert "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}\nmodule load x\n" in script
            command = shlex.split(script.splitlines()[-1])
            assert command[:3] == ["/a folder/bin/python", "-m", "distributed.cli.dask_worker"]
            assert client.scheduler.address in command and command[-3:] == ["--z", "--nthreads", "1"]
            assert "--nworkers" not in command
    assert client.status == "closed" and (user_cache / "xattn" / "slurm").is_dir()


def test_jobqueue_yaml_can_name_a_python_and_a_folder_for_logs(jobs, tmp_path):
    given = {"jobqueue.slurm.log-directory": str(tmp_path / "logs"), "jobqueue.slurm.python": "python3"}
    with dask.config.set(given), connect("slurm:1"):
        (script,) = submitted(jobs, 1)
    assert f"#SBATCH -o {tmp_path}/logs/" in script and "--output" not in script
    assert "\npython3 -m distributed" in script


def test_slurm_that_rejects_jobs_or_is_absent_is_an_error(jobs, monkeypatch):
    (jobs / "sbatch").write_text("#!/bin/sh\necho 'invalid partition: x' >&2; exit 1\n")
    with pytest.raises(OSError, match=r"^SLURM takes no jobs \(invalid partition: x\): correct Dask's jobqueue.yaml"):
        connect("slurm:1").__enter__()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match=r"^SLURM takes no jobs \(.*'sbatch'\): correct Dask's jobqueue.yaml"):
        connect("slurm:1").__enter__()


def test_folder_of_logs_that_cannot_be_made_is_named(jobs, monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    with pytest.raises(
        OSError, match=r"cache/slurm could not be written, because .*/cache is a file where a folder is"
    ):
        connect("slurm:1").__enter__()


def test_cluster_is_closed_if_its_scheduler_does_not_answer(jobs, monkeypatch):
    dask_jobqueue, clusters = pytest.importorskip("dask_jobqueue"), []

    class Recorded(dask_jobqueue.SLURMCluster):
        def __init__(self, **options):
            super().__init__(**options)
            clusters.append(self)

    monkeypatch.setattr(dask_jobqueue, "SLURMCluster", Recorded)

    def silent(*arguments, **options):
        raise TimeoutError

    monkeypatch.setattr(distributed, "Client", silent)
    with pytest.raises(OSError, match="No Dask scheduler answers at slurm:3: start one there, or change WORKERS"):
        connect("slurm:3").__enter__()
    assert clusters[0].status == distributed.Status.closed


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
