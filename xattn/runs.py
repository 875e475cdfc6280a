"""A corpus through a model into a folder of maps: progress, resuming, cost; in this process or on workers."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from os.path import abspath
from pathlib import Path
from threading import Lock

from xattn import store
from xattn.attribution.settings import Occlusion
from xattn.audio import check_file
from xattn.data.utterance import Utterance
from xattn.explain import HARDLY, determinants, direction_of, explain_directions, known_reference, reliabilities
from xattn.models import Decoding, S2TModel, load_model
from xattn.models.errors import NothingToExplain


def explain_corpus(
    model: S2TModel,
    utterances: Sequence[Utterance],
    folder: str | Path,
    *,
    translate_to: str | Sequence[str] | None = None,
    occlusion: Occlusion | None = None,
    decoding: Decoding | None = None,
    progress: bool = True,
    workers=None,
) -> None:
    """Explain utterances of one language and store their maps; what is stored already is skipped.

    Read the maps with `xattn.load_maps`. Runs survive interruption: the same call resumes, and at most ten seconds are
    lost. Utterances whose recording cannot be read, is silent or too long for the model or the memory, or for which it
    writes fewer than two tokens, are skipped; a list of them with the reasons is printed at the end.

    Args:
        folder: for the maps, <model>/<direction>/<utterance>.
        translate_to: the language of the output; by default the spoken one. Several languages, which may include the
            spoken one, share the encoder's passes.
        occlusion, decoding: see `xattn.explain`.
        progress: whether to print a line for each utterance, with the time left, and the list of those skipped.
        workers: a Dask client from `xattn.workers.connect`. Workers need the files of model and corpus and `folder`.

    Raises:
        ValueError: the utterances are not all in one language.
    """
    languages = {utterance.language for utterance in utterances}
    if len(languages) != 1:
        raise ValueError(
            f"The utterances are in {', '.join(sorted(languages)) or 'no language'}: explain one language at a time."
        )
    (language,) = languages
    targets = [translate_to] if translate_to is None or isinstance(translate_to, str) else translate_to
    directions = [direction_of(language, target) for target in targets]
    folder = Path(folder).resolve()  # workers may run elsewhere
    occlusion = (occlusion or Occlusion()).on(model)
    unit = partial(explain_into, directions=directions, folder=folder, occlusion=occlusion, decoding=decoding)
    if workers is None:
        outcomes = ((utterance, unit(model, utterance)) for utterance in utterances)
    else:
        outcomes = _on_workers(workers, model, utterances, unit)
    started, done, keys, skipped = time.monotonic(), 0, {}, []
    for number, (utterance, (found, message)) in enumerate(outcomes, start=1):
        keys[utterance.id] = found
        if not found:
            skipped.append(f"{utterance.id}: {message}")
        if message and progress:
            done += 1
            seconds = (time.monotonic() - started) / done
            print(
                f"{model.name} {'+'.join(directions)} {number}/{len(utterances)} {utterance.id}: {message}; "
                f"{seconds:.1f} s per utterance, {seconds * (len(utterances) - number):.0f} s left",
                flush=True,
            )
    for direction in directions:
        index = {u.id: keys[u.id][direction] for u in utterances if keys[u.id]}
        references = {utterance.id: known_reference(utterance, direction) for utterance in utterances}
        store.save_index(index, folder, model.name, direction, references)
    if skipped and progress:
        print("\n".join([f"{len(skipped)} of {len(utterances)} utterances have no maps:", *skipped]), flush=True)


def explain_into(
    model: S2TModel,
    utterance: Utterance,
    directions: Sequence[str],
    folder: Path,
    occlusion: Occlusion,
    decoding: Decoding | None = None,
) -> tuple[dict[str, str], str]:
    """Explain one utterance into the folder of maps, unless it is stored there.

    Returns:
        (keys, message): the key for each direction, empty if the utterance was skipped; what was done, empty if the
        maps were already current.
    """
    try:
        audio = _bytes_of(utterance)
    except (OSError, ValueError) as error:
        return {}, f"skipped ({error})"
    origin = determinants(model, audio, utterance.id, occlusion)
    if utterance.end is not None:
        origin["part"] = [utterance.start, utterance.end]
    if utterance.channel is not None:
        origin["channel"] = utterance.channel
    if decoding is not None:
        origin["decoding"] = asdict(decoding)
    if occlusion.reliability < 1 or occlusion.seconds:  # the number of perturbations depends on all directions
        origin["settings"] = sorted(directions)
    keys = {direction: store.key_of(origin | {"setting": direction}) for direction in directions}
    paths = {direction: store.path_of(folder, model.name, direction, utterance.id) for direction in directions}
    if all(store.is_current(paths[direction], keys[direction]) for direction in directions):
        return keys, ""
    checkpoint = store.Checkpoint(paths[directions[0]].with_name(f".{utterance.id}.partial.npz"), store.key_of(keys))
    try:
        utterance = replace(utterance, samples=utterance.audio())
    except (OSError, ValueError) as error:
        return {}, f"skipped ({error})"
    try:
        explained = explain_directions(
            model, utterance, directions, occlusion, decoding=decoding, least=2, checkpoint=checkpoint
        )
    except (NothingToExplain, MemoryError) as error:
        return {}, f"skipped ({error})"
    for maps in explained:
        if not store.is_current(paths[maps.setting], keys[maps.setting]):  # a run was killed between two directions
            store.save(maps, paths[maps.setting], keys[maps.setting])
    checkpoint.remove()
    several = len(explained) > 1
    found = ", ".join(f"{maps.setting} {reliabilities(maps)}" if several else reliabilities(maps) for maps in explained)
    message = f"explained; reliability {found}"
    hardly = [maps.setting for maps in explained if maps.hidden_divergence < HARDLY]
    if hardly:
        message += f"; what {model.name} wrote ({', '.join(hardly)}) hardly depends on the recording"
    return keys, message


def _bytes_of(utterance: Utterance) -> bytes:
    """What determines the audio of an utterance: its file or its samples. OSError, ValueError: see `check_file`."""
    if utterance.samples is not None:
        return utterance.samples.tobytes()
    check_file(utterance.audio_path)
    return utterance.audio_path.read_bytes()


def estimate_cost(
    model: S2TModel, utterances: Sequence[Utterance], directions: Sequence[str], occlusion: Occlusion
) -> tuple[float, float]:
    """Estimate the run time in seconds and the disk space in bytes of `explain_corpus`.

    A few batches of masks of the utterance of median length are timed; time and size are assumed to grow linearly with
    the length.
    """
    utterances = [each for each in utterances if not math.isnan(each.duration)] or utterances  # the others are skipped
    utterance = sorted(utterances, key=lambda item: item.duration)[len(utterances) // 2]
    few = occlusion.on(model).batch_size
    unlimited = replace(occlusion, reliability=1.0, seconds=None)  # so that every timed run computes all its masks
    seconds, size = {}, 0.0
    for number in ((few, few), (few, few), (3 * few, few), (few, 3 * few)):  # the first run warms up
        started = time.monotonic()
        maps = explain_directions(
            model, utterance, directions, replace(unlimited, input_masks=number[0], encoder_masks=number[1])
        )
        seconds[number] = time.monotonic() - started
    once = seconds[few, few]
    per_mask = [max(0.0, seconds[number] - once) / (2 * few) for number in ((3 * few, few), (few, 3 * few))]
    masks = occlusion.input_masks, occlusion.encoder_masks
    once += sum(each * (number - few) for each, number in zip(per_mask, masks, strict=True))
    for item in maps:
        fixed = item.drop_vars(["input_saliency", "input_scores", "encoder_scores"]).nbytes
        size += fixed + sum(masks) * item.sizes["token"] * item.input_scores.dtype.itemsize
    ratio = sum(item.duration for item in utterances) / utterance.duration
    return once * ratio, size * ratio


def _on_workers(client, model: S2TModel, utterances: Sequence[Utterance], unit: Callable) -> Iterator[tuple]:
    from distributed import as_completed

    folder = Path(model.source)
    # A hub id has no folder. The path of a symbolic link is kept, because the model is named after it.
    source = abspath(folder) if folder.is_dir() else model.source
    task = partial(_on_worker, source, str(model.device), model.weights_hash, unit)
    futures = {client.submit(task, _resolved(utterance), pure=False): utterance for utterance in utterances}
    for future, outcome in as_completed(futures, with_results=True):
        yield futures[future], outcome


def _resolved(utterance: Utterance) -> Utterance:
    manifest, path = (each and each.resolve() for each in (utterance.manifest, utterance.audio_path))
    return replace(utterance, audio_path=path, manifest=manifest)


def _on_worker(
    source: str, device: str, weights_hash: str, unit: Callable, utterance: Utterance
) -> tuple[dict[str, str], str]:
    with _one_at_a_time:
        return unit(_loaded(source, device, weights_hash), utterance)


_one_at_a_time = Lock()  # several threads of a worker would compete for memory and cores


@lru_cache(maxsize=1)  # a worker may live longer than many models
def _loaded(source: str, device: str, weights_hash: str) -> S2TModel:
    model = load_model(source, device)
    if model.weights_hash != weights_hash:
        raise ValueError(f"{source} holds other weights than the model that was loaded from it: load it again.")
    return model
