"""A wheel of the library works in an empty folder, without the repository."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import soundfile
from matplotlib.image import imread

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
import xattn, xattn.figures

assert Path(xattn.__file__).is_relative_to(Path(sys.argv[1])), xattn.__file__
model = xattn.load_model(sys.argv[2])
maps = xattn.explain(model, "recording.wav", occlusion=xattn.Occlusion(20, 20))
print("overall:", float(xattn.correlate(maps.cross_attention, maps.input_saliency).overall))
xattn.figures.save(xattn.figures.heatmaps(maps), "heatmaps")
"""


def test_a_wheel_explains_a_recording_in_an_empty_folder(tmp_path, tiny_folder, utterances):
    source, wheels, site, empty = (tmp_path / name for name in ("source", "wheels", "site", "empty"))
    empty.mkdir()
    # A build leaves files beside its source, so it gets a copy.
    shutil.copytree(ROOT / "xattn", source / "xattn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("xattn-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packages = {name.split("/")[0] for name in archive.namelist() if ".dist-info" not in name}
    assert packages == {"xattn"}
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    soundfile.write(empty / "recording.wav", utterances[1].audio(), 16_000)
    # -P keeps the repository, from which the tests run, off the path.
    command = [sys.executable, "-P", "-c", PROGRAM, str(site), str(tiny_folder)]
    environment = {"PATH": "", "PYTHONPATH": str(site), "HOME": str(empty), "MPLCONFIGDIR": str(empty / "matplotlib")}
    result = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("Transcript: ") for line in lines)
    assert -1 <= float(lines[-1].removeprefix("overall: ")) <= 1
    assert min(imread(empty / "heatmaps.png").shape[:2]) > 300  # pixels
