"""How a recording is perturbed, and how many perturbations fit into memory at once."""

import math
import re
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import psutil
import torch

from xattn.attribution.estimators import ESTIMATORS
from xattn.attribution.segments import PARTITIONS
from xattn.models import S2TModel
from xattn.models.errors import NothingToExplain

PRECISIONS = ("auto", "float32", "bfloat16")
SHARES = {"cuda": 1 / 2}  # of the free memory, for a batch; 1/8 elsewhere, where other processes need it too
CELL_ARRAYS = 7  # arrays of float64 (token, time, mel) held at once by an estimate and its half maps; measured: 6.7
TOKENS_PER_SECOND = 8  # more than anyone speaks
CONTAINER = Path("/sys/fs/cgroup")  # where Docker and Kubernetes state the memory of a container (cgroup 2)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 rather than emulating it."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(precision: str, device: torch.device) -> str:
    """The precision that is used on a device: "float32" or "bfloat16"."""
    return "bfloat16" if precision != "float32" and has_bfloat16(device) else "float32"


@dataclass(frozen=True)
class Occlusion:
    """How a recording is perturbed. The defaults are for a first look, not the paper's.

    input_masks, encoder_masks: largest numbers of perturbations, N_X and N_H (20,000 each in the paper).
    input_p, encoder_p: probability that a superpixel or an encoder step is hidden (0.5 and 0.7 in the paper).
    seed: together with the utterance's id it determines every mask.
    precision: of the perturbed passes: "float32", "bfloat16", or "auto" for bfloat16 if the device computes in it.
        bfloat16 is faster; tokens that hardly depend on the input lose accuracy (benchmarks/README.md).
    estimator: how scores become a map: "mean" (the paper's), "sqrt_mean", "ridge" or "sqrt_ridge"; see
        `xattn.attribution.estimators`.
    partition: what is hidden in the input: "superpixels" (the paper's), "spread" (superpixels of three sizes) or
        "windows" of time over all bands, which need fewer perturbations; see `xattn.attribution.segments`.
    reliability: stop once the maps, in the form that is compared with attention, have this split-half reliability;
        1.0 disables early stopping.
    seconds: stop after this time, whatever the reliability; SM^X can use three quarters of it. None for no limit. With
        a limit, the number of perturbations depends on the machine.
    batch_size: largest number of perturbations computed at once; None for the model's own. Long recordings have
        smaller batches, see `fitting_batch`. It affects numbers only by rounding.
    """

    input_masks: int = 8000
    encoder_masks: int = 8000
    input_p: float = 0.5
    encoder_p: float = 0.7
    seed: int = 0
    precision: str = "auto"
    estimator: str = "sqrt_ridge"
    partition: str = "windows"
    reliability: float = 0.8
    seconds: float | None = None
    batch_size: int | None = None

    def __post_init__(self):
        for name, choices in (("precision", PRECISIONS), ("estimator", ESTIMATORS), ("partition", PARTITIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"There is no {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        for name in ("input_p", "encoder_p", "reliability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 0 to 1.")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}: give a number above 0, or None.")
        for name, least in (("input_masks", 1), ("encoder_masks", 1), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is None and name == "batch_size":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}.")
            object.__setattr__(self, name, int(value))  # numpy's integers are not JSON values, which keys need

    def on(self, model: S2TModel) -> "Occlusion":
        """Return a copy with precision and batch_size resolved for the model and its device.

        "bfloat16" becomes "float32", with a printed line, on a device that does not compute in it.
        """
        precision = resolve_precision(self.precision, model.device)
        if self.precision == "bfloat16" and precision != "bfloat16":
            print("Precision: float32, because this processor does not compute in bfloat16.", flush=True)
        return replace(self, precision=precision, batch_size=self.batch_size or model.batch_size)


def free_bytes(device: torch.device) -> int:
    """Memory that a device still has, which a container can limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> float:
    try:
        limit, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = int(re.search(r"^inactive_file (\d+)$", (CONTAINER / "memory.stat").read_text(), re.MULTILINE)[1])
    except (OSError, ValueError, TypeError):  # there is no container, no limit, or an older version of cgroup
        return math.inf
    return limit - used + cache  # files in the cache give way


def needed_bytes(model: S2TModel, frames: int, bands: int, tokens: int) -> int:
    """Memory that one perturbation and the map of a recording need at least, roughly."""
    return model.pass_bytes(frames, tokens) + CELL_ARRAYS * 8 * tokens * frames * bands


def check_memory(model: S2TModel, features: torch.Tensor, name: str) -> None:
    """NothingToExplain: features (T, F) of the recording `name` are too long for the memory that is free."""
    frames, bands = features.shape
    seconds = frames * model.frame_seconds
    tokens = min(model.decoding.max_length, round(TOKENS_PER_SECOND * seconds))
    needed, free = needed_bytes(model, frames, bands, tokens), free_bytes(model.device)
    if needed > free:
        raise NothingToExplain(
            f"{name} lasts {seconds:.0f} s, which needs about {needed / 1e9:.0f} GB of memory with {model.name}, and "
            f"{free / 1e9:.0f} GB are free: cut it with xattn.cut_at_pauses, or use a machine with more memory."
        )


def fitting_batch(model: S2TModel, frames: int, tokens: int, largest: int) -> int:
    """How many perturbations of a recording fit into a share of the free memory: from 1 to `largest`."""
    share = SHARES.get(model.device.type, 1 / 8) * free_bytes(model.device)
    return max(1, min(largest, int(share / model.pass_bytes(frames, tokens))))
