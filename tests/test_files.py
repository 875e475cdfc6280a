"""Files that cannot be written are named with the reason and a remedy that fits it."""

import errno
import os
from pathlib import Path

import pandas as pd
import pytest

from reproduction import summaries, tables
from xattn import store
from xattn.files import replacing, write_whole

SENTENCES = {
    errno.ENOSPC: " (No space left on device): make room and call this again.",
    errno.EACCES: (
        ", because you have no permission to write there: change the permissions of its folder or choose another "
        "folder and call this again."
    ),
    errno.EROFS: ", because it is on a read-only file system: choose another folder and call this again.",
    errno.EISDIR: ", because it is a folder: rename that folder and call this again.",
    errno.EIO: " (Input/output error): check its folder and the disk and call this again.",
    errno.ENAMETOOLONG: " (File name too long): shorten the path and call this again.",
}
SENTENCES |= {errno.EPERM: SENTENCES[errno.EACCES]}


@pytest.mark.parametrize("number", SENTENCES)
@pytest.mark.parametrize("function", ["mkdir", "replace"])
def test_reason_and_remedy_fit_the_error(tmp_path, monkeypatch, number, function):
    def refused(*arguments, **options):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "tab.csv"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refused)
        if function == "mkdir":
            path = tmp_path / "new" / "tab.csv"
        with pytest.raises(OSError) as error:
            write_whole(path, b"new")
    assert str(error.value) == f"{path} could not be written{SENTENCES[number]}"
    assert (tmp_path / "tab.csv").read_text() == "old" and os.listdir(tmp_path) == ["tab.csv"]


@pytest.mark.parametrize("name", ["tab.csv", "en/tab.csv"])
def test_file_in_the_place_of_a_folder_is_named(tmp_path, name):
    (tmp_path / "out").touch()
    sentence = f"because {tmp_path}/out is a file where a folder is needed: rename that file and call this again\\.$"
    path, table = tmp_path / "out" / name, pd.DataFrame({"rho": ["0.4"]})
    for write in (
        lambda: write_whole(path, b""),
        lambda: summaries.write(path.with_suffix(""), numbers=table),
        lambda: tables.save(table, path, "Caption."),
        lambda: store.save_index({}, path, "tiny", "en"),
    ):
        with pytest.raises(OSError, match=sentence):
            write()


def test_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(OSError, match="could not be written, because it is a folder: rename that folder and call this"):
        write_whole(tmp_path, b"")


def test_error_that_is_not_about_writing_passes_through(tmp_path):
    with pytest.raises(OSError, match=r"^damaged$"), replacing(tmp_path / "x"):
        raise OSError("damaged")
    assert not os.listdir(tmp_path)


def test_checkpoint_without_permission_says_so_and_that_the_run_continues(tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    store.Checkpoint(tmp_path / "x.npz", "key").save("input", pd.Series([1.0]).to_numpy())
    assert capsys.readouterr().out == (
        f"{tmp_path}/x.npz could not be written, because you have no permission to write there: change the permissions "
        "of its folder or choose another folder; the run continues, but would lose this utterance if it were "
        "interrupted.\n"
    )
