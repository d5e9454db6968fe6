"""The work `onnx` of `speed.py`: a trained model in torch, ONNX Runtime and OpenVINO on the CPU, on real candidates.

    python benchmarks/speed.py --work onnx --model runs/my/model --data DIR --out speed.jsonl

Every side is a `Reranker` that scores the same pairs, tokenization included; what it ranks is measured too. Torch
packs its pairs and the others pad them, so that pairs of equal lengths would flatter the others.
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from speed_report import ranged, spread
from speed_works import Disagreement, say

TORCH, ONNX, INT8, OPENVINO = "torch", "ONNX", "ONNX int8", "OpenVINO"
RUNTIMES = ("onnxruntime", "openvino")
LIMIT = 1e-3  # largest difference of a score of float32 sides
WIDTHS = (24, 22, 12, 16, 10)  # of the table's columns


def run_onnx(options: argparse.Namespace, scratch: Path) -> dict:
    """Everything that goes into the line of JSON. Raises Disagreement where a float32 side scores otherwise."""
    from rag_retrieval import Reranker
    from rag_retrieval.evaluate.ranking_data import read_ranking_data
    from rag_retrieval.export.verify import first_queries

    say("onnx ...")
    data = first_queries(read_ranking_data(options.data, "test", "bm25", options.depth), options.queries)
    pairs = [(data.queries[query], data.documents[each]) for query, own in data.candidates.items() for each in own]
    folders = export_both(options.model, scratch)
    sides = {TORCH: Reranker(options.model, device="cpu"), ONNX: Reranker(folders[ONNX]), INT8: Reranker(folders[INT8])}
    if importlib.util.find_spec("openvino") is not None:
        sides[OPENVINO] = Reranker(folders[ONNX], model_type="openvino")
    seconds, scores = take_turns(
        {name: lambda each=side: each.compute_score(pairs) for name, side in sides.items()}, options.rounds
    )
    check_agreement(scores)
    encoded = sides[TORCH].backend.pair_encoder.encode(pairs)
    return {
        "work": "onnx",
        "model": str(options.model),
        "threads": options.threads,
        "runtimes": {name: version(name) for name in RUNTIMES if importlib.util.find_spec(name)},
        "rounds": options.rounds,
        "data": data.name,
        "queries": len(data.qrels),
        "depth": options.depth,
        "pairs": len(pairs),
        "tokens_of_a_pair": sum(map(len, encoded)) / len(encoded),
        "sides": {name: summary(name, seconds, scores, data, folders) for name in sides},
    }


def export_both(model: Path, scratch: Path) -> dict[str, Path]:
    """The folders of float32 and of int8, which is kept whatever it costs: the table says what that is."""
    from rag_retrieval import ExportConfig, export_model

    folders = {ONNX: scratch / "float32", INT8: scratch / "int8"}
    export_model(ExportConfig(model=str(model), output=str(folders[ONNX])))
    export_model(ExportConfig(model=str(model), output=str(folders[INT8]), quantize="int8", force=True))
    return folders


def take_turns(sides: dict[str, Callable[[], np.ndarray]], rounds: int) -> tuple[dict, dict]:
    """Seconds of each side in each round, and its scores. Every other round is in reversed order, and one call of
    each side that is not timed comes first."""
    scores = {name: call() for name, call in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
            say(f"  round {number + 1}, {name}: {seconds[name][-1]:.3f} s")
    return seconds, scores


def check_agreement(scores: dict[str, np.ndarray]) -> None:
    for name in (ONNX, OPENVINO):
        if name in scores and not np.abs(scores[name] - scores[TORCH]).max() <= LIMIT:
            difference = np.abs(scores[name] - scores[TORCH]).max()
            raise Disagreement(f"{name} and torch differ by {difference:.2g}; expected at most {LIMIT}")


def summary(name: str, seconds: dict, scores: dict, data, folders: dict[str, Path]) -> dict:
    from rag_retrieval.metrics import run_metrics

    values = iter(scores[name].tolist())
    run = {query: {each: next(values) for each in own} for query, own in data.candidates.items()}
    folder = folders[INT8 if name == INT8 else ONNX]
    return {
        "pairs_per_second": spread([len(scores[name]) / taken for taken in seconds[name]]),
        "times_torch": spread([own / taken for own, taken in zip(seconds[TORCH], seconds[name], strict=True)]),
        "ndcg@10": run_metrics(data.qrels, run, ("ndcg@10",))["ndcg@10"],
        "largest_difference": float(np.abs(scores[name] - scores[TORCH]).max()),
        "file_bytes": None if name == TORCH else sum(os.path.getsize(file) for file in folder.glob("model.onnx*")),
    }


def describe_onnx(result: dict) -> str:
    lines = [
        f"onnx: {result['model']} on the CPU, {result['threads']} threads",
        f"  {result['rounds']} rounds of {result['pairs']:,} pairs of {result['tokens_of_a_pair']:.0f} tokens: "
        f"{result['data']}, {result['queries']} queries, {result['depth']} candidates each",
        row("", ("pairs a second (range)", "times torch (range)", "nDCG@10", "largest diff.", "MB")),
    ]
    return "\n".join([*lines, *(row(name, cells(side)) for name, side in result["sides"].items())])


def row(name: str, values: tuple[str, ...]) -> str:
    return f"  {name:<12}" + "".join(f"{value:>{width}}" for value, width in zip(values, WIDTHS, strict=True))


def cells(side: dict) -> tuple[str, ...]:
    size = side["file_bytes"]
    return (
        ranged(side["pairs_per_second"], 1, 1),
        ranged(side["times_torch"], 1, 2),
        f"{side['ndcg@10']:.4f}",
        f"{side['largest_difference']:.1e}",
        "-" if size is None else f"{size / 1e6:.0f}",
    )
