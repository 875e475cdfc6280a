"""A run that is killed loses nothing, and several at once do no harm; `make faults` does it at length."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

from benchmarks.faults import kill_all
from xattn import store

RUN = """
import sys
from pathlib import Path
import xattn, xattn.occlusion
from xattn.explain import Occlusion
from xattn.runs import explain_corpus
xattn.occlusion.CHECKPOINT_SECONDS = 0.1
model, corpus, folder = sys.argv[1:]
model, utterances = xattn.load_model(model), xattn.load_corpus(corpus, language="en", split="test")
print("ready", flush=True)
explain_corpus(model, utterances, ["en", "en-it"], Path(folder), Occlusion(600, 600, batch_size=8, precision="float32"))
"""


@pytest.fixture
def start(tiny_folder, corpus_folder):
    def starting(folder):
        command = [sys.executable, "-c", RUN, str(tiny_folder), str(corpus_folder), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return starting


def stored(folder):
    return [
        maps.assign_attrs(seconds=None)
        for setting in ("en", "en-it")
        for maps in store.load_all(folder, "tiny", setting)
    ]


def test_kills_at_random_moments_lose_nothing(start, tmp_path):
    assert start(tmp_path / "whole").wait() == 0
    moments, folder, resumed = random.Random(0), tmp_path / "killed", 0
    for _ in range(3):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.zarr.zip")}
        process = start(folder)
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None and not list(folder.rglob(".*.partial.npz")):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed += len(list(folder.rglob(".*.partial.npz")))
        assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert resumed
    assert start(folder).wait() == 0
    expected, found = stored(tmp_path / "whole"), stored(folder)
    assert len(expected) == len(found) == 4
    for one, other in zip(expected, found, strict=True):
        xr.testing.assert_identical(one, other)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kill_reaches_kernels_in_sessions_of_their_own():
    kernel = "import time; time.sleep(60)"
    parent = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {kernel!r}], start_new_session=True).pid, flush=True)
{kernel}
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child = Path("/proc", process.stdout.readline().strip())
    assert (child / "cmdline").read_text().count("time.sleep") == 1
    kill_all(process.pid)
    assert process.wait() == -signal.SIGKILL
    for _ in range(100):  # until whoever inherits it has noticed
        if not child.exists() or (child / "stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the kernel lives on")


def test_two_runs_at_once_end_in_the_same_maps(start, tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0], processes[0].stderr.read() + processes[1].stderr.read()
    assert len(stored(tmp_path)) == 4
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_full_disk_ends_in_one_sentence_and_leaves_finished_work(model, utterances, tmp_path, monkeypatch):
    from xattn.explain import Occlusion
    from xattn.runs import explain_corpus

    occlusion = Occlusion(6, 6, precision="float32")
    explain_corpus(model, utterances[:1], ["en"], tmp_path, occlusion)
    write = xr.Dataset.to_zarr

    def full(self, *arguments, **keywords):
        write(self[["features"]], *arguments, **keywords)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(xr.Dataset, "to_zarr", full)
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\): make room and run"):
            explain_corpus(model, utterances, ["en"], tmp_path, occlusion)
    assert [maps.utterance for maps in store.load_all(tmp_path, "tiny", "en")] == ["en-test-0"]
    assert not list(tmp_path.rglob(".*.zarr"))
    explain_corpus(model, utterances, ["en"], tmp_path, occlusion)
    assert len(list(store.load_all(tmp_path, "tiny", "en"))) == 2
