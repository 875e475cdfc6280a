"""Speed and memory as ratios measured in one run: `make bench`, or `python -m benchmarks.bench --device cuda`.

Every comparison interleaves what it compares, repeats it and takes the fastest, because other work on a machine only
ever adds time. Results are printed and written to benchmarks/results/<processor>.json with machine and versions.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import xattn
from xattn.estimators import UnitScores, estimate
from xattn.explain import Occlusion, explain_targets, map_reliability
from xattn.models import S2TModel
from xattn.models.conformer import ConformerConfig, ConformerForConditionalGeneration, ConformerModel
from xattn.occlusion import Masks, Partition, divergence_from, occlude
from xattn.provenance import versions
from xattn.runs import explain_corpus
from xattn.segments import slic_pyramid
from xattn.workers import connect

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3


def fastest(*contestants: Callable[[], object]) -> list[float]:
    """Seconds of each, the fastest of REPEATS rounds in which all take their turn; the first round warms up."""
    rounds = []
    for _ in range(REPEATS + 1):
        seconds = []
        for contestant in contestants:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            contestant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rounds.append(seconds)
    return np.min(rounds[1:], axis=0).tolist()


def alone(function: Callable, *arguments):
    """What a function of this module returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak(run: Callable[[], object]) -> int:
    """KiB above what this process holds, freed memory given back, that a call takes at most (Linux with glibc)."""

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    run()
    return status("VmHWM:") - before


def whole_over_bare(model: S2TModel, utterance, precision: str, number: int = 2000) -> list[dict]:
    """Time of SM^X and SM^H over that of their masked forward passes with the same batches.

    The whole includes superpixels, masks, scores, the published estimate, its cells and its split-half reliability, in
    shares that depend on the number of masks: the default of `Occlusion`.
    """
    features = model.features(utterance.audio())
    states = model.encode(features[None])
    ids = model.generate(features[None], utterance.language)[0]
    inputs, tokens = torch.cat([model.prompt(utterance.language), ids])[:-1], model.tokens(ids)
    rows = slice(len(inputs) - len(ids), None)
    batch = Occlusion().on(features.device).batch_size
    occluded = partial(occlude, batch_size=batch, device=features.device)
    found = []
    with torch.autocast(features.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        decode = model.decoder_without_steps(states)
        divergence = divergence_from(model.decode(states, inputs)[0, rows])
        passes = {
            "SM^X": (
                lambda: Partition.of(slic_pyramid(features.cpu().numpy())),
                0.5,
                lambda keep: model.decode(model.encode(features * keep), inputs),
            ),
            "SM^H": (
                lambda: Partition.of(np.arange(states.shape[1])[None]),
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
                map_reliability(scores, masks, tokens, model, "mean")

            seconds = fastest(whole, bare)
            found.append({
                "what": f"{name} over its bare passes, {model.name}, {precision}",
                "ratio": seconds[0] / seconds[1],
                "detail": f"{1000 * seconds[0] / number:.2f} ms a mask, {len(features)} frames, {len(ids)} tokens",
            })  # fmt: skip
    return found


def floor(model: S2TModel, utterance, precision: str) -> list[dict]:
    """Time of a batch of masked passes over what its operations take at the machine's rate of matrix products."""
    features = model.features(utterance.audio())
    ids = model.generate(features[None], utterance.language)[0]
    inputs = torch.cat([model.prompt(utterance.language), ids])[:-1]
    batch, size = features.expand(Occlusion().on(features.device).batch_size, -1, -1).clone(), 2048
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    square = torch.randn(size, size, device=features.device).to(kind)
    with torch.autocast(features.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        with FlopCounterMode(display=False) as counter:
            model.decode(model.encode(batch), inputs)
        seconds = fastest(lambda: model.decode(model.encode(batch), inputs), lambda: square @ square)
    operations, rate = counter.get_total_flops(), 2 * size**3 / seconds[1]
    weights = sum(parameter.nbytes for parameter in model.network.parameters())
    detail = (
        f"{operations / len(batch) / 1e9:.2f} G operations a mask at {rate / 1e9:.0f} G a second of a matrix product; "
        f"{weights / 1e6:.0f} MB of weights read a batch of {len(batch)}"
    )
    what = f"masked passes over their operations at that rate, {model.name}, {precision}"
    return [{"what": what, "ratio": seconds[0] * rate / operations, "detail": detail}]


def one_batch() -> list[dict]:
    """Scoring and accumulation of 64 masks, 40 tokens, 500 x 80 cells and 8,000 pieces, each way in its own process.

    The published algorithm, KL from probabilities and dense sums over every token's cells, against ours. Each starts
    from what its model passes give.
    """
    ours, dense = (alone(batch_scored, name) for name in ("ours", "dense"))
    detail = f"{1000 * ours[0]:.0f} and {1000 * dense[0]:.0f} ms"
    memory = f"{ours[1] / 1024:.0f} and {dense[1] / 1024:.0f} MiB above the inputs"
    return [
        {"what": "time of one batch, dense over ours", "ratio": dense[0] / ours[0], "detail": detail},
        {"what": "memory of one batch, dense over ours", "ratio": dense[1] / max(ours[1], 1), "detail": memory},
    ]


def batch_scored(how: str) -> tuple[float, int]:
    """Seconds and KiB that one batch takes on one thread, "dense" or "ours"."""
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

    peaks = [peak(timed) for _ in range(REPEATS + 1)]
    return min(seconds), peaks[-1]


def paper_size(device: str) -> list[dict]:
    """A model of the paper's base size (random weights do) on 8 s of audio: its rate, and the hours of a test set.

    EuroParl-ST's English test set has about 3 hours of audio (paper, settings); N_X = N_H = 20,000, bfloat16.
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
    keep = (torch.rand(batch, frames // model.subsampling, device=device) > 0.7).float()
    with torch.autocast(device, torch.bfloat16):
        states = model.encode(features)
        divergence = divergence_from(model.decode(states[:1], ids)[0])
        decode = model.decoder_without_steps(states[:1])
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
    return [
        {"what": "encoder's share of the rate of a matrix product, paper's base size, bfloat16", "ratio": share,
         "detail": f"{rate / 1e12:.3f} T operations a second"},
        {"what": "hours for SM^X and SM^H of EuroParl-ST en at N = 20,000, paper's base size", "ratio": hours,
         "detail": f"{batch / whole:.0f} and {batch / steps:.0f} masks a second, batches of {batch}, {tokens} tokens"},
    ]  # fmt: skip


def growth(model: S2TModel, utterances) -> list[dict]:
    """How cost grows with masks, length and utterances, as cost for four times as much over four times the cost."""
    by_length = sorted(utterances, key=lambda utterance: utterance.duration)
    short, long = by_length[0], by_length[-1]

    def run(items, number):
        occlusion = Occlusion(input_masks=number, encoder_masks=number)
        for item in items:
            explain_targets(model, item, [item.language], occlusion)

    middle = by_length[len(by_length) // 2]
    few, many = fastest(partial(run, [middle], 256), partial(run, [middle], 1024))
    found = [{"what": "masks, four times as many", "ratio": many / (4 * few), "detail": f"{few:.1f} and {many:.1f} s"}]
    one, four = fastest(partial(run, [middle], 256), partial(run, [middle] * 4, 256))
    detail = f"{one:.1f} and {four:.1f} s"
    found.append({"what": "utterances, four times as many", "ratio": four / (4 * one), "detail": detail})
    seconds = fastest(partial(run, [short], 256), partial(run, [long], 256))
    times = long.duration / short.duration
    detail = f"{short.duration:.1f} s of audio in {seconds[0]:.1f} s, {long.duration:.1f} in {seconds[1]:.1f}"
    found.append({"what": "length, relative", "ratio": seconds[1] / (times * seconds[0]), "detail": detail})
    few, many = (alone(memory_of_masks, model.source, str(model.device), middle, number) for number in (1024, 4096))
    detail = f"{few / 1024:.0f} and {many / 1024:.0f} MiB above the model, at 1,024 and at 4,096 masks"
    found.append({"what": "peak memory, four times as many masks", "ratio": many / few, "detail": detail})
    return found


def memory_of_masks(source: str, device: str, utterance, number: int) -> int:
    """KiB that explaining an utterance takes above what a process holds that has explained it by few masks before."""
    model = xattn.load_model(source, device)

    def run(number: int):
        explain_targets(model, utterance, [utterance.language], Occlusion(number, number))

    run(32)
    return peak(lambda: run(number))


def workers(model: S2TModel, utterances) -> list[dict]:
    """Throughput of two workers of one thread over that of one."""
    occlusion, seconds = Occlusion(input_masks=800, encoder_masks=800), []
    for number in ("1", "2"):
        with connect(number) as client, tempfile.TemporaryDirectory() as folder:
            client.run(torch.set_num_threads, 1)
            explain_corpus(model, utterances[: int(number)], ["en"], Path(folder, "warm"), occlusion, client)
            started = time.perf_counter()
            explain_corpus(model, utterances, ["en"], Path(folder, "maps"), occlusion, client)
            seconds.append(time.perf_counter() - started)
    detail = f"{len(utterances)} utterances in {seconds[0]:.0f} and {seconds[1]:.0f} s"
    return [{"what": "two workers over one", "ratio": seconds[0] / seconds[1], "detail": detail}]


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "models" / "base")
    arguments = parser.parse_args()
    model = xattn.load_model(arguments.model, arguments.device)
    utterances = xattn.load_corpus(ROOT / "data", language="en", split="test")[:16]
    rows = []
    for step in (
        *(partial(whole_over_bare, model, utterances[3], precision) for precision in ("float32", "bfloat16")),
        *(partial(floor, model, utterances[3], precision) for precision in ("float32", "bfloat16")),
        one_batch,
        partial(paper_size, arguments.device),
        partial(growth, model, utterances),
        partial(workers, model, utterances),
    ):
        for row in step():
            rows.append({**row, "ratio": round(row["ratio"], 3)})
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
