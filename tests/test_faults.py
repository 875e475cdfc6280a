"""Killed runs, concurrent runs and a full disk; `make faults` tests kills of a whole profile."""

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
from xattn import explain_corpus, load_maps
from xattn.explain import Occlusion

RUN = """
import sys
from pathlib import Path
import xattn
import xattn.attribution.occlusion
xattn.attribution.occlusion.CHECKPOINT_SECONDS = 0.1
model, corpus, folder = sys.argv[1:]
model, utterances = xattn.load_model(model), xattn.load_corpus(corpus, language="en", split="test")
print("ready", flush=True)
occlusion = xattn.Occlusion(600, 600, batch_size=8, precision="float32", reliability=1.0)
xattn.explain_corpus(model, utterances, Path(folder), translate_to=["en", "it"], occlusion=occlusion)
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
        for direction in ("en", "en-it")
        for maps in load_maps(folder, "tiny", direction)
    ]


def test_kills_at_random_moments_lose_no_maps(start, tmp_path):
    assert start(tmp_path / "whole").wait() == 0
    moments, folder, resumed = random.Random(0), tmp_path / "killed", 0
    for _ in range(3):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.zarr.zip")}
        process = start(folder)
        assert "ready\n" in iter(process.stdout.readline, "")
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
def test_kill_all_reaches_processes_in_other_sessions():
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
    for _ in range(100):  # until its new parent collects it
        if not child.exists() or (child / "stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the kernel is still running")


def test_two_concurrent_runs_write_the_same_maps(start, tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0], processes[0].stderr.read() + processes[1].stderr.read()
    assert len(stored(tmp_path)) == 4
    assert not [path for path in tmp_path.rglob(".*")]


def test_full_disk_is_reported_and_keeps_finished_maps(model, utterances, tmp_path, monkeypatch):
    occlusion = Occlusion(6, 6, precision="float32")
    explain_corpus(model, utterances[:1], tmp_path, occlusion=occlusion)
    write = xr.Dataset.to_zarr

    def full(self, *arguments, **keywords):
        write(self[["features"]], *arguments, **keywords)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(xr.Dataset, "to_zarr", full)
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\): make room and make the"):
            explain_corpus(model, utterances, tmp_path, occlusion=occlusion)
    assert [maps.utterance for maps in load_maps(tmp_path, "tiny", "en")] == ["en-test-0"]
    assert not list(tmp_path.rglob(".*.zarr"))
    explain_corpus(model, utterances, tmp_path, occlusion=occlusion)
    assert len(list(load_maps(tmp_path, "tiny", "en"))) == 2
