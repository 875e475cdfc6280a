"""JupyterLab as `make lab` starts it."""

import json
import re

from jupyterlab.labapp import LabApp

from reproduction.lab import KernelsInRoot
from reproduction.tables import ROOT


def test_kernels_start_in_the_root_and_know_the_folder_of_their_notebook(tmp_path):
    (tmp_path / "notebooks" / "paper").mkdir(parents=True)
    manager = KernelsInRoot(root_dir=str(tmp_path))
    assert manager.cwd_for_path("notebooks/paper", env={"A": "b"}) == str(tmp_path)
    assert manager.cwd_for_path("notebooks/paper") == str(tmp_path / "notebooks" / "paper")


def test_make_lab_names_files_and_options_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (first,) = re.findall(r"--LabApp\.default_url=/lab/tree/(\S+)", makefile)
    (settings,) = re.findall(r"--LabApp\.app_settings_dir=(\S+)", makefile)
    assert (ROOT / first).is_file()
    assert {"default_url", "app_settings_dir"} <= set(LabApp.class_trait_names())
    overrides = json.loads((ROOT / settings / "overrides.json").read_text(encoding="utf-8"))
    assert overrides == {
        "@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"}
    }
