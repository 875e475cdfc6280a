"""Measure speed and memory as ratios: `make bench`, or `python -m benchmarks.bench --device cuda`.

Each comparison alternates between its candidates, repeats them and keeps the fastest round, because other work on the
machine can only add time. Results are printed and written to benchmarks/results/<processor>.json with machine and
versions.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig, WhisperFeatureExtractor

import xattn
from reproduction.provenance import versions
from xattn.analysis.reliability import half_maps, split_half_reliability
from xattn.attribution.estimators import UnitScores, estimate
from xattn.attribution.occlusion import Masks, Partition, divergence_from, occlude
from xattn.attribution.segments import partition, slic_pyramid
from xattn.data.utterance import Utterance
from xattn.explain import Occlusion, explain_directions
from xattn.models import S2TModel
from xattn.models.conformer import ConformerConfig, ConformerForConditionalGeneration, ConformerModel
from xattn.models.whisper import WhisperModel, WhisperNetwork
from xattn.runs import explain_corpus
from xattn.workers import ENVIRONMENT, connect

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3


def fastest(*candidates: Callable[[], object]) -> list[float]:
    """Return the seconds of each candidate in its fastest round of REPEATS; a first round warms up.

    All candidates run in every round.
    """
    rounds = []
    for _ in range(REPEATS + 1):
        seconds = []
        for candidate in candidates:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            candidate()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rounds.append(seconds)
    return np.min(rounds[1:], axis=0).tolist()


def in_new_process(function: Callable, *arguments):
    """Return the result of a function of this module, called in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak_memory(run: Callable[[], object]) -> int:
    """Return the peak memory of a call in KiB above what the process held before (Linux with glibc)."""

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # return freed memory first
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS:")
    run()
    return status("VmHWM:") - before


def result(what: str, ratio: float, detail: str) -> dict:
    """Return a row of the results: the quantity, its ratio, and absolute numbers."""
    return {"what": what, "ratio": round(ratio, 3), "detail": detail}


def forced(model: S2TModel, features: torch.Tensor, language: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode features (T, F); return the hypothesis (I,) and the decoder inputs (P + I - 1,) that force it."""
    ids = model.generate(features[None], language)[0]
    return ids, torch.cat([model.prompt(language), ids])[:-1]


def overhead(model: S2TModel, utterance: Utterance, precision: str, number: int = 2000) -> list[dict]:
    """Measure the time of SM^X and SM^H relative to their masked forward passes alone, with the same batches.

    The maps include superpixels, masks, scores, the published estimate, its cells and its split-half reliability. Their
    shares depend on the number of masks, which is the default of `Occlusion` here.
    """
    features = model.features(utterance.audio())
    states, step_frames = model.encode(features[None]), model.step_frames(len(features))
    ids, inputs = forced(model, features, utterance.language)
    rows = slice(len(inputs) - len(ids), None)
    batch = Occlusion().on(model).batch_size
    occluded = partial(occlude, batch_size=batch, device=features.device)
    found = []
    with model.perturbing(precision) as model:
        decode = model.masked_decoder(states)
        divergence = divergence_from(model.decode(states, inputs)[0, rows])
        passes = {
            "SM^X": (
                lambda: Partition.of(slic_pyramid(features.cpu().numpy())),
                0.5,
                lambda keep: model.decode(model.encode(model.mask_input(features, keep)), inputs),
            ),
            "SM^H": (
                lambda: Partition.of(np.arange(len(step_frames))[None]),
                0.7,
                lambda keep: decode(keep, inputs),
            ),
        }
        for name, (partition, p, forward) in passes.items():
            keeps = []
            occluded(lambda keep, k=keeps: k.append(keep) or torch.zeros(len(keep), 1),
                     Masks(partition(), number, p, 0, "bench"))  # fmt: skip

            def bare(forward=forward, keeps=keeps):
                for keep in keeps:
                    forward(keep)

            def whole(forward=forward, partition=partition, p=p):
                masks = Masks(partition(), number, p, 0, "bench")
                scores = occluded(lambda keep: divergence(forward(keep)[:, rows]), masks)
                estimate(scores, masks).cells(masks.partition.labels)
                split_half_reliability(half_maps(scores, masks, step_frames, "mean"))

            seconds = fastest(whole, bare)
            what = f"time of {name} over its masked passes alone, {model.name}, {precision}"
            detail = f"{1000 * seconds[0] / number:.2f} ms per mask, {len(features)} frames, {len(ids)} tokens"
            found.append(result(what, seconds[0] / seconds[1], detail))
    return found


def peak_rate(model: S2TModel, utterance: Utterance, precision: str) -> list[dict]:
    """Measure the time of masked passes relative to the time of as many operations in large matrix products."""
    features = model.features(utterance.audio())
    _, inputs = forced(model, features, utterance.language)
    batch, size = features.expand(Occlusion().on(model).batch_size, -1, -1).clone(), 2048
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    square = torch.randn(size, size, device=features.device).to(kind)
    with model.perturbing(precision) as model:
        with FlopCounterMode(display=False) as counter:
            model.decode(model.encode(batch), inputs)
        seconds = fastest(lambda: model.decode(model.encode(batch), inputs), lambda: square @ square)
    operations, rate = counter.get_total_flops(), 2 * size**3 / seconds[1]
    weights = sum(parameter.nbytes for parameter in model.network.parameters())
    detail = (
        f"{operations / len(batch) / 1e9:.2f} G operations per mask, {rate / 1e9:.0f} G per second in a matrix "
        f"product; {weights / 1e6:.0f} MB of weights for each batch of {len(batch)}"
    )
    what = f"time of masked passes over that of as many operations in a matrix product, {model.name}, {precision}"
    return [result(what, seconds[0] * rate / operations, detail)]


def whisper(precision: str, device: str, number: int = 40) -> list[dict]:
    """Measure passes of Whisper tiny.en, with random weights, over 30 s, and SM^X of 10 s of audio with windows."""
    config = WhisperConfig(
        vocab_size=51_864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536,
    )  # fmt: skip
    names = ("<|startoftranscript|>", "<|notimestamps|>")
    vocabulary = {f"<{token}>": token for token in range(config.vocab_size)}
    vocabulary |= dict(zip(names, (config.decoder_start_token_id, config.vocab_size - 1502), strict=True))
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
    network = WhisperNetwork(config).to(device).eval()
    model = WhisperModel(network, WhisperFeatureExtractor(), tokenizer, "whisper-tiny.en", "")
    features = torch.randn(1000, config.num_mel_bins, device=device)
    inputs = torch.randint(config.vocab_size, (30,), device=device)
    states, step_frames = model.encode(features[None]), model.step_frames(len(features))
    square = torch.randn(2048, 2048, device=device).to(getattr(torch, precision))
    windows = Partition.of(partition(features.cpu().numpy(), "windows", model.frame_seconds))
    with model.perturbing("bfloat16") as passes, FlopCounterMode(display=False) as counter:
        passes.encode(features[None])  # the counter does not see torch's fused attention, which float32 uses
    with model.perturbing(precision) as model:
        divergence, keeps = divergence_from(model.decode(states, inputs)[0]), []
        occluded = partial(occlude, masks=Masks(windows, number, 0.5, 0, "bench"), batch_size=model.batch_size)
        occluded(lambda keep: keeps.append(keep) or torch.zeros(len(keep), 1))

        def encoder() -> None:
            for keep in keeps:
                model.encode(model.mask_input(features, keep.to(device)))

        def bare() -> None:
            for keep in keeps:
                model.decode(model.encode(model.mask_input(features, keep.to(device))), inputs)

        def whole() -> None:
            masks = Masks(windows, number, 0.5, 0, "bench")
            scores = occlude(
                lambda keep: divergence(model.decode(model.encode(model.mask_input(features, keep)), inputs)),
                masks,
                batch_size=model.batch_size,
                device=device,
            )
            estimate(scores, masks, "sqrt_ridge").cells(windows.labels)
            split_half_reliability(half_maps(scores, masks, step_frames, "sqrt_ridge"))

        seconds = fastest(encoder, bare, whole, lambda: [square @ square for _ in range(10)])
    operations, rate = counter.get_total_flops(), 10 * 2 * 2048**3 / seconds[3]
    achieved = number * operations / seconds[0]
    what = f"rate of the encoder over that of a matrix product, Whisper tiny.en, {precision}"
    detail = (
        f"{1000 * seconds[0] / number:.0f} ms per pass over 30 s of {operations / 1e9:.1f} G operations, "
        f"{1000 * operations / rate:.0f} ms at the {rate / 1e9:.0f} G per second of a matrix product"
    )
    found = [result(what, achieved / rate, detail)]
    what = f"time of SM^X over its masked passes alone, Whisper tiny.en, {precision}"
    detail = f"{1000 * seconds[2] / number:.0f} ms per mask, {1000 * seconds[1] / number:.0f} ms for its passes"
    return [*found, result(what, seconds[2] / seconds[1], detail)]


def scoring() -> list[dict]:
    """Compare how the published implementation and the kit score and sum a batch, in time and in memory.

    The published one computes KL divergences from probabilities and keeps dense sums over all cells of every token.
    Each runs in its own process and starts from the output of the model.
    """
    ours, dense = (in_new_process(score_batch, name) for name in ("ours", "dense"))
    detail = f"{1000 * dense[0]:.0f} and {1000 * ours[0]:.0f} ms"
    memory = f"{dense[1] / 1024:.0f} and {ours[1] / 1024:.0f} MiB above the inputs"
    return [
        result("time to score a batch, published over ours", dense[0] / ours[0], detail),
        result("memory to score a batch, published over ours", dense[1] / max(ours[1], 1), memory),
    ]


def score_batch(how: str) -> tuple[float, int]:
    """Score 64 masks of 40 tokens, 500 x 80 cells and a vocabulary of 8,000 on one thread; return seconds and KiB.

    how: "dense" (the published implementation) or "ours".
    """
    torch.set_num_threads(1)
    noise = np.random.default_rng(0).standard_normal((500, 80)).astype(np.float32)
    masks = Masks(Partition.of(slic_pyramid(noise)), 64, 0.5, 0, "bench")
    log_p = torch.randn(40, 8000, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    log_q = torch.randn(64, 40, 8000, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    if how == "dense":
        p, q = log_p.exp(), log_q.exp_()
        levels, hidden = masks.draw(0, 64)
        keep = [~row[masks.partition.labels[level]] for level, row in zip(levels, hidden, strict=True)]
        keep = torch.from_numpy(np.stack(keep)).float()

        def run():
            scores = (p * p.log() - p * q.log()).sum(-1)  # (B, I)
            hidden = 1 - keep  # (B, T, F)
            return (scores[:, :, None, None] * hidden[:, None]).sum(0), hidden.sum(0)
    else:
        divergence = divergence_from(log_p)

        def run():
            return UnitScores.of(divergence(log_q).numpy(), masks)

    seconds = []

    def timed():
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
        return result

    peaks = [peak_memory(timed) for _ in range(REPEATS + 1)]
    return min(seconds), peaks[-1]


def paper_size(device: str) -> list[dict]:
    """Measure a model of the paper's base size, with random weights, on 8 s of audio in bfloat16.

    The hours are an estimate for the English test set of EuroParl-ST, about 3 hours of audio, at N_X = N_H = 20,000
    (paper, section 4).
    """
    shape = {"d_model": 512, "vocab_size": 8000, "conv_channels": 1024, "language_ids": {"en": 4}}
    for part, layers in (("encoder", 12), ("decoder", 6)):
        shape |= {f"{part}_layers": layers, f"{part}_ffn_dim": 2048, f"{part}_attention_heads": 8}
    config = ConformerConfig(**shape)
    network = ConformerForConditionalGeneration(config).to(device).eval()
    model, frames, tokens = ConformerModel(network, None, "random", ""), 800, 40
    batch, size = (128, 8192) if device == "cuda" else (8, 2048)
    features = torch.randn(batch, frames, config.input_feat_per_channel, device=device)
    ids = torch.randint(5, config.vocab_size, (tokens,), device=device)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    keep = (torch.rand(batch, len(model.step_frames(frames)), device=device) > 0.7).float()
    with torch.autocast(device, torch.bfloat16):
        states = model.encode(features)
        divergence = divergence_from(model.decode(states[:1], ids)[0])
        decode = model.masked_decoder(states[:1])
        with FlopCounterMode(display=False) as counter:
            model.encode(features)
        encoder, whole, steps, product = fastest(
            lambda: model.encode(features),
            lambda: divergence(model.decode(model.encode(features), ids)),
            lambda: divergence(decode(keep, ids)),
            lambda: square @ square,
        )
    rate = counter.get_total_flops() / encoder
    share = rate / (2 * size**3 / product)
    hours = 3 * 3600 / 8 * 20_000 * (whole + steps) / batch / 3600
    what = "rate of the encoder over that of a matrix product, paper's base size, bfloat16"
    found = [result(what, share, f"{rate / 1e12:.3f} T operations per second")]
    what = "hours for SM^X and SM^H of EuroParl-ST en at N = 20,000, paper's base size"
    detail = f"{batch / whole:.0f} and {batch / steps:.0f} masks per second, batches of {batch}, {tokens} tokens"
    return [*found, result(what, hours, detail)]


def scaling(model: S2TModel, utterances: Sequence[Utterance]) -> list[dict]:
    """Measure how cost grows with masks, utterances and length: 1 means in proportion, less means cheaper."""
    by_length = sorted(utterances, key=lambda utterance: utterance.duration)
    short, long = by_length[0], by_length[-1]

    def run(items, number):
        occlusion = Occlusion(input_masks=number, encoder_masks=number)
        for item in items:
            explain_directions(model, item, [item.language], occlusion)

    middle = by_length[len(by_length) // 2]
    few, many = fastest(partial(run, [middle], 256), partial(run, [middle], 1024))
    what, detail = "time for four times as many masks over four times the time", f"{few:.1f} and {many:.1f} s"
    found = [result(what, many / (4 * few), detail)]
    one, four = fastest(partial(run, [middle], 256), partial(run, [middle] * 4, 256))
    what, detail = "time for four times as many utterances over four times the time", f"{one:.1f} and {four:.1f} s"
    found.append(result(what, four / (4 * one), detail))
    seconds = fastest(partial(run, [short], 256), partial(run, [long], 256))
    times = long.duration / short.duration
    detail = f"{short.duration:.1f} s of audio in {seconds[0]:.1f} s, {long.duration:.1f} s in {seconds[1]:.1f} s"
    what = "time for a longer utterance over time in proportion to its length"
    found.append(result(what, seconds[1] / (times * seconds[0]), detail))
    few, many = (
        in_new_process(memory_of_masks, model.source, str(model.device), middle, number) for number in (1024, 4096)
    )
    detail = f"{few / 1024:.0f} MiB above the model at 1,024 masks, {many / 1024:.0f} MiB at 4,096"
    return [*found, result("peak memory for four times as many masks", many / few, detail)]


def memory_of_masks(source: str, device: str, utterance: Utterance, number: int) -> int:
    """Return the peak memory in KiB of explaining an utterance with `number` masks, after a first call with few."""
    model = xattn.load_model(source, device)

    def run(number: int):
        explain_directions(model, utterance, [utterance.language], Occlusion(number, number))

    run(32)
    return peak_memory(lambda: run(number))


def worker_scaling(model: S2TModel, utterances: Sequence[Utterance]) -> list[dict]:
    """Measure the throughput of two workers of one thread relative to that of one."""
    occlusion, seconds = Occlusion(input_masks=800, encoder_masks=800), []
    for number in ("1", "2"):
        with connect(number) as client, tempfile.TemporaryDirectory() as folder:
            client.run(torch.set_num_threads, 1)
            explain = partial(explain_corpus, model, occlusion=occlusion, workers=client)
            explain(utterances[: int(number)], Path(folder, "warm-up"))
            started = time.perf_counter()
            explain(utterances, Path(folder, "maps"))
            seconds.append(time.perf_counter() - started)
    detail = f"{len(utterances)} utterances in {seconds[0]:.0f} and {seconds[1]:.0f} s"
    return [result("throughput of two workers over one", seconds[0] / seconds[1], detail)]


EXPLAIN = """
import sys
import xattn
source, device, recording = sys.argv[1:]
model = xattn.load_model(source, device)
occlusion = xattn.Occlusion(800, 800, reliability=1.0)
for _ in sys.stdin:
    xattn.explain(model, recording, language="en", occlusion=occlusion, progress=False)
    print("explained", flush=True)
"""


def two_at_once(source: str | Path, device: str, recording: Path) -> list[dict]:
    """Compare the time of two runs of `explain` at once with that of one alone.

    Each is in a process of its own, with the environment of `make lab`. Their models are loaded before.
    """

    def explain(processes: Sequence[subprocess.Popen]) -> None:
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            if process.stdout.readline() != "explained\n":
                raise RuntimeError("A run of explain has failed: see its error above.")

    command = [sys.executable, "-c", EXPLAIN, str(source), device, str(recording)]
    with ExitStack() as stack:
        processes = []
        for _ in range(2):
            # Runs that share a cache would continue each other's unfinished scores.
            cache = {"XDG_CACHE_HOME": stack.enter_context(tempfile.TemporaryDirectory())}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
            process = subprocess.Popen(command, env=ENVIRONMENT | os.environ | cache, **pipes)
            processes.append(stack.enter_context(process))
            stack.callback(process.stdin.close)  # ends it
        alone, both = fastest(partial(explain, processes[:1]), partial(explain, processes))
    return [result("time of two runs of explain at once over one alone", both / alone, f"{both:.1f} and {alone:.1f} s")]


def processor() -> str:
    """Return the name of the GPU, or of the processor if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "models" / "base", help="default: base")
    arguments = parser.parse_args()
    model = xattn.load_model(arguments.model, arguments.device)
    utterances = xattn.load_corpus(ROOT / "data", language="en", split="test")[:16]
    rows = []
    for measure in (
        *(partial(overhead, model, utterances[3], precision) for precision in ("float32", "bfloat16")),
        *(partial(peak_rate, model, utterances[3], precision) for precision in ("float32", "bfloat16")),
        scoring,
        *(partial(whisper, precision, arguments.device) for precision in ("float32", "bfloat16")),
        partial(paper_size, arguments.device),
        partial(scaling, model, utterances),
        partial(worker_scaling, model, utterances),
        partial(two_at_once, arguments.model, arguments.device, utterances[3].audio_path),
    ):
        for row in measure():
            rows.append(row)
            print(f"{row['ratio']:8.2f}  {row['what']} ({row['detail']})", flush=True)
    name = re.sub(r"\W+", "-", f"{processor()} {os.cpu_count()} cores").strip("-").lower()
    facts = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts |= {"python": platform.python_version(), "packages": versions(), "rows": rows}
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
