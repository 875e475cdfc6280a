"""Files and folders that `load_model` cannot load: one sentence says what they are and what to do."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from xattn.models import load_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 75539400\n"


def refused(path, sentence, kind=ValueError):
    """Check that loading fails with this sentence, in which {} stands for the path."""
    with pytest.raises(kind) as error:
        load_model(path)
    assert str(error.value) == sentence.replace("{}", str(path))


LAYOUT = (
    "give the same model as a folder, in the layout of transformers or faster-whisper, or its id on the Hugging Face "
    "hub, such as "
)
MODEL = "give a model folder, such as data/models/base, or the id of a model on the Hugging Face hub, such as "


@pytest.mark.parametrize("magic", [b"lmgg", b"ggml", b"GGUF"])
@pytest.mark.parametrize("name", ["ggml-tiny.en.bin", "whisper"])
def test_a_file_of_whisper_cpp_is_named_as_such(tmp_path, name, magic):
    (tmp_path / name).write_bytes(magic + bytes(range(100)))
    sentence = "{} is a ggml or GGUF file, the formats of whisper.cpp, which the kit does not read: "
    refused(tmp_path / name, f"{sentence}{LAYOUT}openai/whisper-tiny.en.")


def test_a_nemo_file_is_named_as_such(tmp_path):
    (tmp_path / "canary-1b.nemo").write_bytes(b"./model_config.yaml")
    refused(
        tmp_path / "canary-1b.nemo",
        f"{{}} is a NeMo file, which the kit does not read: {MODEL}openai/whisper-tiny.en.",
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_in_a_model_folder_names_the_folder(tiny_folder, name):
    refused(tiny_folder / name, f"{{}} is a file in a model folder: give the folder, {tiny_folder}.")


def test_any_other_file_is_not_a_folder(tmp_path):
    for name, content in (("weights.bin", b"\0\1\2"), ("empty", b""), ("model.safetensors", b"")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{{}} is a file and not a model folder: {MODEL}openai/whisper-tiny.en.")


@pytest.mark.parametrize(
    ("content", "base"),
    [
        ('{"base_model_name_or_path": "openai/whisper-tiny", "peft_type": "LORA"}', "openai/whisper-tiny"),
        ('{"base_model_name_or_path": null}', "a model that it does not name"),
        ("[", "a model that it does not name"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_an_adapter_names_its_base_model(tiny_folder, tmp_path, content, base, complete):
    """Beside a complete model, too: without PEFT, transformers would ignore the adapter."""
    folder = tmp_path / "lora"
    shutil.copytree(tiny_folder, folder) if complete else folder.mkdir()
    (folder / "adapter_config.json").write_text(content)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refused(
        folder,
        f"{{}} holds a PEFT adapter (adapter_config.json) of {base}: merge it into that model with PEFT's "
        "`merge_and_unload`, write the result with `save_pretrained` to a new folder, and give that folder.",
    )


def without_weights(folder, name, model_type):
    """A folder whose only weights are in a file of this name."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / name).write_bytes(b"\x80\2}.")
    return folder


@pytest.mark.parametrize("model_type", ["whisper", "speech_to_text", "seamless_m4t_v2"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_read(tmp_path, name, model_type):
    refused(
        without_weights(tmp_path / "folder", name, model_type),
        f"{{}} has its weights only in a pickle file ({name}), which is not read because it can execute code: call "
        "transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, weights_only=True).save_pretrained(folder) "
        "once, which reads only tensors from it and writes model.safetensors.",
        FileNotFoundError,
    )


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5"])
def test_weights_for_flax_and_tensorflow_are_named_as_such(tmp_path, name):
    refused(
        without_weights(tmp_path / "folder", name, "whisper"),
        f"{{}} has its weights only for Flax or TensorFlow ({name}): use a revision that has model.safetensors, or "
        "convert them with transformers 4 (from_pretrained with from_flax=True or from_tf=True, then save_pretrained).",
        FileNotFoundError,
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "spm.model"])
def test_a_pointer_of_git_lfs_is_named_as_such(tiny_folder, tmp_path, name):
    copy = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (copy / name).write_bytes(POINTER)
    sentence = "is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder, or download the model"
    for path in (copy, copy / name):
        refused(path, f"{copy / name} {sentence} again.")


def test_an_empty_folder_is_named_as_such(tmp_path):
    refused(tmp_path, f"The folder {{}} is empty: {MODEL}openai/whisper-tiny.en.", FileNotFoundError)


def test_a_folder_around_a_model_names_the_model(tiny_folder, tmp_path):
    """The hub's cache of a model has two folders around it."""
    cache = tmp_path / "models--openai--whisper-tiny"
    snapshot = cache / "snapshots" / "0123456789abcdef"
    shutil.copytree(tiny_folder, snapshot)
    (cache / "refs").mkdir()
    for folder in (cache, cache / "snapshots"):
        refused(folder, f"The folder {{}} has no config.json of its own: give {snapshot}.", FileNotFoundError)
    other = snapshot.with_name("fedcba")
    shutil.copytree(tiny_folder, other)
    refused(cache, f"The folder {{}} has no config.json of its own: give {snapshot} or {other}.", FileNotFoundError)
    for name in "abc":
        shutil.copytree(tiny_folder, tmp_path / "many" / name)
    (tmp_path / "many" / "d").mkdir()
    (tmp_path / "many" / "d" / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="many has no config.json: give the folder of a trained model"):
        load_model(tmp_path / "many")


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "spm.model"])
def test_a_denied_permission_is_named_as_such(tiny_folder, tmp_path, monkeypatch, name):
    copy = shutil.copytree(tiny_folder, tmp_path / "tiny")
    path = copy / name
    if os.geteuid():
        path.chmod(0)
    else:  # root may read everything
        for method in ("iterdir", "open"):
            original = getattr(Path, method)

            def denied(self, *arguments, original=original, **keywords):
                if self == path:
                    raise PermissionError(13, "Permission denied", str(self))
                return original(self, *arguments, **keywords)

            monkeypatch.setattr(Path, method, denied)
    sentence = f"The permission to read {path} is denied: change the permissions of the file or of its folder."
    with pytest.raises(PermissionError, match=f"^{re.escape(sentence)}$"):
        load_model(copy)
    path.chmod(0o700)


@pytest.mark.parametrize("given", [None, 5, b"data/models/base", torch.nn.Identity()])
def test_an_object_of_another_type_raises(given):
    sentence = f"A model cannot be loaded from an object of type {type(given).__name__}: {MODEL}openai/whisper-tiny.en."
    refused(given, sentence, TypeError)


def test_a_folder_can_be_given_in_several_ways(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    link = tmp_path / "link"
    link.symlink_to(tiny_folder, target_is_directory=True)
    for path in ("~/tiny", Path("~/tiny"), f"{tiny_folder}/", f"{link}/", link):
        model = load_model(path)
        assert model.name == ("link" if "link" in str(path) else "tiny") and model.weights_hash
    assert load_model("~/tiny").source == str(tiny_folder)
    with pytest.raises(FileNotFoundError, match="There is no model folder ~/nowhere: give the path of one"):
        load_model("~/nowhere")


def test_a_damaged_generation_config_raises(tiny_folder, tmp_path):
    """transformers would ignore it."""
    copy = shutil.copytree(tiny_folder, tmp_path / "tiny")
    for content in ("", "{", "[]", "\udcff"):
        (copy / "generation_config.json").write_text(content, errors="surrogateescape")
        with pytest.raises(ValueError, match="generation_config.json is damaged, because it is not a JSON object: dow"):
            load_model(copy)
