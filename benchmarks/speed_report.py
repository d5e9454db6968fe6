"""The figures of a work: rounds summed up, a table for a person, and what machine and versions they are of.

Ratios are taken within each round, of sides that ran one after the other; what is reported is their median, not the
ratio of two medians.
"""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median

LIBRARIES = ("torch", "transformers", "accelerate", "sentence-transformers", "tokenizers")
OURS, OLD, THEIRS, PLAIN, FLAG = "ours", "older commit", "sentence-transformers", "plain loop", "FlagEmbedding"
WIDTHS = (28, 14, 21, 12, 21, 9)  # of the table's columns


def summarise(job, took: dict[str, list], gemm: dict, timed: list[list], *, units: int, training: bool) -> dict:
    """Of one `speed_training.Job`. took: each side's rounds. gemm: the rate and its shape. timed: the examples of
    each round. units: optimizer steps, or calls, that a round's time is of; all figures are of one."""
    from speed_data import text_pairs, token_lengths
    from speed_floor import TRAINING, model_cost
    from transformers import AutoTokenizer

    tokenizer, cost = AutoTokenizer.from_pretrained(job.model), model_cost(job.model)
    lengths = [token_lengths(tokenizer, text_pairs(part, job.formats), job.max_len) for part in timed]
    factor = TRAINING if training else 1
    floors = [factor * cost.forward_flops(part) / gemm["flops_per_second"] / units for part in lengths]
    pairs = sum(map(len, lengths))
    return {
        "unit": "step" if training else "call",
        "rounds": len(timed),
        "units": units,
        "pairs": pairs // len(timed) // units,
        "tokens_of_a_pair": sum(map(sum, lengths)) / pairs,
        "gemm": gemm,
        "floor_seconds": sum(floors) / len(floors),
        "sides": {name: summary_of_side(rounds, took[OURS], floors, units) for name, rounds in took.items()},
    }


def summary_of_side(rounds: list, ours: list, floors: list[float], units: int) -> dict:
    """rounds, ours: what this side and ours took in each round. floors: seconds of a unit of each round."""
    seconds = [took.seconds / units for took in rounds]
    cpu_seconds = [took.cpu_seconds / units for took in rounds]
    pairs = list(zip(rounds, ours, strict=True))
    return {
        "seconds": spread(seconds),
        "cpu_seconds": spread(cpu_seconds),
        "share_of_floor": spread([floor / value for floor, value in zip(floors, seconds, strict=True)]),
        "times_ours": spread([took.seconds / own.seconds for took, own in pairs]),
        "cpu_times_ours": spread([took.cpu_seconds / own.cpu_seconds for took, own in pairs]),
        "peak_bytes": max((took.peak_bytes for took in rounds if took.peak_bytes), default=None),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def describe(result: dict) -> str:
    """A work's result for a person."""
    unit, gemm, agreement = result["unit"], result["gemm"], result["agreement"]
    texts = result.get("of", "pairs")
    shape = " x ".join(map(str, gemm["shape"]))
    lines = [
        f"{result['work']}: {result['model']}, {result['dtype']} on {result['device']}, {result['threads']} threads",
        f"  {result['rounds']} rounds of {result['units']} {unit}s, each {result['pairs']:,} {texts} of "
        f"{result['tokens_of_a_pair']:.0f} tokens",
        f"  {agreement['of']} differ by at most {agreement['largest_difference']:.1e}",
        f"  floor: {1000 * result['floor_seconds']:.1f} ms a {unit} at {gemm['flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"({shape})",
    ]
    if shares := result.get("cpu_share_of_floor"):
        of_sides = ", ".join(f"{name} {ranged(share, 1, 2)}" for name, share in shares.items())
        lines.append(f"  of the floor in CPU seconds: {of_sides}")
    if "planning_share" in result:
        lines.append(f"  tokenization and planning: {100 * result['planning_share']:.1f}% of a step of ours")
    if "their_trials" in result:
        trials = ", ".join(f"{size}: {value:.3f} s" for size, value in result["their_trials"].items())
        lines.append(f"  {THEIRS} computes {result['their_batch']} {texts} at once, its best in a trial ({trials})")
    names = (f"ms a {unit} (range)", "of the floor", "times ours (range)", "CPU ms", "times ours in CPU s", "GPU MiB")
    return "\n".join([*lines, row("", names), *(row(name, cells(side)) for name, side in result["sides"].items())])


def row(name: str, values: tuple[str, ...]) -> str:
    return f"  {name:<32}" + "".join(f"{value:>{width}}" for value, width in zip(values, WIDTHS, strict=True))


def cells(side: dict) -> tuple[str, ...]:
    peak = side["peak_bytes"]
    return (
        ranged(side["seconds"], 1000, 1),
        f"{side['share_of_floor']['median']:.2f}",
        ranged(side["times_ours"], 1, 2),
        f"{1000 * side['cpu_seconds']['median']:.1f}",
        ranged(side["cpu_times_ours"], 1, 2),
        "-" if peak is None else f"{peak / 2**20:.0f}",
    )


def ranged(values: dict[str, float], factor: float, digits: int) -> str:
    middle, least, most = (f"{factor * values[key]:.{digits}f}" for key in ("median", "least", "most"))
    return f"{middle} ({least}-{most})"


def machine(device: str) -> dict:
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"processor": processor(), "cores": os.cpu_count(), "gpu": gpu, "python": platform.python_version()}


def processor() -> str:
    """The model's name where the system tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}
