"""Notebooks in kernels of their own, through papermill: whatever the folder is called, and only with our own code."""

import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from reproduction.tables import ROOT
from xattn.files import write_whole, writing

AGAIN = " and run this again"
LONGEST_TMPDIR = 75  # bytes; the path of a socket in a folder there may have 103 (macOS)


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error or did not write the outputs of its step, or no notebook can run."""


@cache
def patched_papermill() -> ModuleType:
    """papermill, which writes notebooks whole or not at all here. OSError: see `xattn.files.writing`."""
    import papermill
    from papermill.iorw import LocalHandler, papermill_io

    class Whole(LocalHandler):
        def write(self, buf: str, path: str) -> None:
            write_whole(Path(path), buf.encode(), AGAIN)

    papermill_io.register("", Whole())  # for every path
    return papermill


def escaped(path: Path) -> str:
    """A path for papermill, which would replace a name in braces by a parameter."""
    return str(path).replace("{", "{{").replace("}", "}}")


def tmpdir() -> str:
    """The folder for temporary files: TMPDIR, or another one if that is not usable. OSError: there is none."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise OSError("There is no folder for temporary files: set TMPDIR to one in which you can write.") from error


def temporary_folder() -> tempfile.TemporaryDirectory:
    """A folder for sockets, in TMPDIR or, if paths would be too long there, in /tmp. OSError: it cannot be made."""
    parent = Path(tmpdir() if len(os.fsencode(tmpdir())) <= LONGEST_TMPDIR else "/tmp")
    with writing(parent, AGAIN):
        return tempfile.TemporaryDirectory(dir=parent)


def run_notebook(source: Path, copy: Path, parameters: dict) -> None:
    """Run a notebook in a kernel of its own, streaming what its cells print; save it in `copy` after each cell."""
    from traitlets.config import Config

    with temporary_folder() as folder:
        # Use IPC sockets: kernels started together can race for TCP ports.
        sockets = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        patched_papermill().execute_notebook(
            escaped(source),
            escaped(copy),
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            extra_arguments=["--log-level=CRITICAL"],  # a kernel logs the interrupt that ends it as an error
            shutdown_kernel="immediate",  # unloading its modules would take a second
            config=Config(KernelManager=sockets),
        )


def reason_of(error: Exception) -> str:
    """What stopped a notebook, in one line: an error in a cell, or of the kernel."""
    return " ".join(f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}".split())


def check_kernel() -> None:
    """Raise NotebookFailed if a kernel in the current folder would import other code than ours; see `clone`."""
    code = f"import runpy\nrunpy.run_path({str(ROOT / 'reproduction' / 'clone.py')!r})"
    cell = {"cell_type": "code", "id": "check", "metadata": {}, "execution_count": None, "outputs": [], "source": code}
    with temporary_folder() as folder:
        notebook = Path(folder, "check.ipynb")
        content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        write_whole(notebook, json.dumps(content).encode(), AGAIN)
        try:
            run_notebook(notebook, notebook, {})
        except OSError:
            raise
        except Exception as error:  # a kernel that does not start can raise anything
            raise NotebookFailed(getattr(error, "evalue", reason_of(error))) from None
