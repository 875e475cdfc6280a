"""A corpus through a model into the store: progress, resume, cost, in this process or on workers."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock

from xattn import store
from xattn.corpus import Utterance
from xattn.explain import VERSION, NothingToExplain, Occlusion, explain_targets
from xattn.models import S2TModel, load_model


def explain_corpus(
    model: S2TModel,
    utterances: Sequence[Utterance],
    settings: Sequence[str],
    folder: Path,
    occlusion: Occlusion,
    client=None,
) -> None:
    """Explain utterances of one language into the store, an utterance at a time; what is there already is skipped.

    Args:
        settings: of the paper, all with the utterances' language as source ("en", "en-it"); they share encoder passes.
        client: of `xattn.workers.connect`; its workers have to see the model's and the corpus's files and `folder`, and
            their threads take turns, so that one each is enough.

    An utterance for which the model writes fewer than two tokens is left out, as nothing can be correlated there.
    """
    sources = {setting.partition("-")[0] for setting in settings}
    foreign = next((u for u in utterances if {u.language} != sources), None)
    if foreign is not None:
        raise ValueError(
            f"Utterance {foreign.id} is spoken in {foreign.language!r}, but not all of the settings "
            f"{', '.join(settings)} start from it: explain one source language at a time."
        )
    folder = Path(folder).resolve()  # workers may be elsewhere
    unit = partial(explain_into, settings=list(settings), folder=folder, occlusion=occlusion.on(model.device))
    if client is None:
        outcomes = ((utterance, unit(model, utterance)) for utterance in utterances)
    else:
        outcomes = _on_workers(client, model, utterances, unit)
    started, done, keys = time.monotonic(), 0, {}
    for number, (utterance, (found, said)) in enumerate(outcomes, start=1):
        keys[utterance.id] = found
        if said:
            done += 1
            seconds = (time.monotonic() - started) / done
            print(
                f"{model.name} {'+'.join(settings)} {number}/{len(utterances)} {utterance.id}: {said}; "
                f"{seconds:.1f} s an utterance, {seconds * (len(utterances) - number):.0f} s left",
                flush=True,
            )
    for setting in settings:
        index = {u.id: keys[u.id][setting] for u in utterances if keys[u.id]}
        references = {utterance.id: utterance.text(setting) for utterance in utterances}
        store.save_index(index, folder, model.name, setting, references)


def explain_into(
    model: S2TModel, utterance: Utterance, settings: Sequence[str], folder: Path, occlusion: Occlusion
) -> tuple[dict[str, str], str]:
    """Explain one utterance into the store, unless it is there: its keys, none where it was left out, and what was
    done, "" where nothing."""
    origin = asdict(replace(occlusion, batch_size=1)) | {  # the batch size changes the numbers by rounding only
        "weights": model.weights_hash,
        "audio": hashlib.sha256(utterance.audio_path.read_bytes()).hexdigest(),
        "utterance": utterance.id,
        "version": VERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-image", "numpy")},
    }
    if occlusion.reliability < 1:  # perturbations end where the maps of all settings are reliable
        origin["settings"] = sorted(settings)
    keys = {setting: store.key_of(origin | {"setting": setting}) for setting in settings}
    paths = {setting: store.path_of(folder, model.name, setting, utterance.id) for setting in settings}
    if all(store.is_current(paths[setting], keys[setting]) for setting in settings):
        return keys, ""
    partial_path = paths[settings[0]].with_name(f".{utterance.id}.partial.npz")
    checkpoint = store.Checkpoint(partial_path, store.key_of(keys))
    targets = [setting.rpartition("-")[2] for setting in settings]
    try:
        for maps in explain_targets(model, utterance, targets, occlusion, least=2, checkpoint=checkpoint):
            if not store.is_current(paths[maps.setting], keys[maps.setting]):  # a kill between two settings
                store.save(maps, paths[maps.setting], keys[maps.setting])
    except NothingToExplain as error:
        return {}, f"left out ({error})"
    partial_path.unlink(missing_ok=True)
    return keys, "explained"


def cost(
    model: S2TModel, utterances: Sequence[Utterance], settings: Sequence[str], occlusion: Occlusion
) -> tuple[float, float]:
    """Seconds and bytes that `explain_corpus` would take, from a few batches of masks of one utterance.

    That utterance is the one of median length; time and size are taken to grow with the length.
    """
    targets = [setting.rpartition("-")[2] for setting in settings]
    utterance = sorted(utterances, key=lambda item: item.duration)[len(utterances) // 2]
    few = occlusion.on(model.device).batch_size
    seconds, size = {}, 0.0
    for number in ((few, few), (few, few), (3 * few, few), (few, 3 * few)):  # the first one warms up
        started = time.monotonic()
        maps = explain_targets(
            model, utterance, targets, replace(occlusion, input_masks=number[0], encoder_masks=number[1])
        )
        seconds[number] = time.monotonic() - started
    once = seconds[few, few]
    mask = [max(0.0, seconds[number] - once) / (2 * few) for number in ((3 * few, few), (few, 3 * few))]
    masks = occlusion.input_masks, occlusion.encoder_masks
    once += sum(each * (number - few) for each, number in zip(mask, masks, strict=True))
    for item in maps:
        fixed = item.drop_vars(["input_saliency", "input_scores", "encoder_scores"]).nbytes
        size += fixed + sum(masks) * item.sizes["token"] * item.input_scores.dtype.itemsize
    share = sum(item.duration for item in utterances) / utterance.duration
    return once * share, size * share


def _on_workers(client, model: S2TModel, utterances: Sequence[Utterance], unit: Callable) -> Iterator[tuple]:
    from distributed import as_completed

    folder = Path(model.source)
    source = str(folder.resolve()) if folder.is_dir() else model.source  # a hub id has no folder
    task = partial(_on_worker, source, str(model.device), model.weights_hash, unit)
    futures = {client.submit(task, _resolved(utterance), pure=False): utterance for utterance in utterances}
    for future, outcome in as_completed(futures, with_results=True):
        yield futures[future], outcome


def _resolved(utterance: Utterance) -> Utterance:
    manifest = utterance.manifest and utterance.manifest.resolve()
    return replace(utterance, audio_path=utterance.audio_path.resolve(), manifest=manifest)


def _on_worker(
    source: str, device: str, weights_hash: str, unit: Callable, utterance: Utterance
) -> tuple[dict[str, str], str]:
    with _turn:
        return unit(_loaded(source, device, weights_hash), utterance)


_turn = Lock()  # threads of a worker share the model, whose attention is switched to another implementation and back


@lru_cache(maxsize=1)  # a worker may outlive many models
def _loaded(source: str, device: str, weights_hash: str) -> S2TModel:
    model = load_model(source, device)
    if model.weights_hash != weights_hash:
        raise ValueError(f"{source} holds other weights than the model that was loaded from it: load it again.")
    return model
