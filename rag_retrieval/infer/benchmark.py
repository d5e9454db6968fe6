"""The command `benchmark`: how fast models compute on this machine, how long one query takes, and in what memory.

Rerankers and embedders of torch, and exported folders in ONNX Runtime and OpenVINO, alike: all through `Reranker` and
`Embedder`, tokenization included. Several models take turns in one process. Each one's memory is that of a process of
its own. Nothing here imports torch before a model of torch is opened.
"""

import json
import multiprocessing
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from rag_retrieval.core.config import NAMES, Config, ModelName, OutputPath, key
from rag_retrieval.core.files import write_text
from rag_retrieval.core.log import Progress
from rag_retrieval.core.terminal import plain_table, rendered, terminal_columns
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.onnx_backend import default_threads
from rag_retrieval.infer.onnx_folder import EmbedderDescription, OnnxDescription, RerankerDescription, holds
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.models.options import DeviceName
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.settings import ModelFiles, resolve_model_path

QUERIES, QUERY_WORDS = 100, 8  # different ones whose latency is measured, and their length
LATENCY_TOKENS = 128  # of a pair whose latency is measured
WORDS = """river mountain harbour copper winter garden engine market teacher window forest village silver paper bridge
answer question water doctor memory signal station letter summer kitchen machine history island language music number
office people picture planet problem product program school science season service street student system theory travel
weather"""
LIBRARIES = ("rag-retrieval", "torch", "transformers", "tokenizers", "onnxruntime", "openvino")
MB = 1e6
INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")  # of x86 and ARM


class BenchmarkConfig(Config):
    """One measurement."""

    main_keys: ClassVar = ("model", "openvino", "lengths", "batch_sizes", "output")

    model: Annotated[list[ModelName], NAMES] = Field(
        min_length=1, description="Folder, hub name, or package:NAME of a model, or of several, which are compared."
    )
    openvino: bool = key("Run exported folders in OpenVINO too, beside ONNX Runtime.", False)
    lengths: Annotated[list[Annotated[int, Field(ge=16)]], NAMES] = key(
        "Lengths of texts, or of pairs, in tokens.", [32, 128, 512], min_length=1
    )
    batch_sizes: Annotated[list[Annotated[int, Field(ge=1)]], NAMES] = key(
        "Texts, or pairs, that are given together.", [1, 8, 32], min_length=1
    )
    documents: int = key("Documents that are reranked where a reranker's latency is measured.", 20, ge=1)
    seconds: float = key("Time of one turn of a model, at least; one call where that takes longer.", 1.0, gt=0)
    rounds: int = key("Turns of each model; figures are medians of them.", 3, ge=1)
    device: DeviceName = Field(
        None, min_length=1, description="Such as cpu, cuda:0, mps or npu:0. Absent: a GPU if there is one."
    )
    output: OutputPath | None = key("A file for all figures as JSON, beside the table.", min_length=1)


class Subject:
    """A model that is measured. unit: what it computes. texts: of one call of `compute`."""

    def __init__(self, folder: str, runtime: str | None, device: str | None):
        """runtime: "openvino" or None for the folder's own. Raises ValueError as `Reranker` and `Embedder`."""
        options: dict[str, Any] = {"device": device} if runtime is None else {"model_type": runtime}
        self.folder, self.embeds = folder, is_embedder(folder)
        self.model = (Embedder if self.embeds else Reranker)(folder, **options)
        self.runtime, self.precision = "torch", ""
        if exported_kind(folder) is not None:
            self.runtime, self.precision = self.model.backend.runtime.name, self.model.backend.description.precision
        self.unit = "texts" if self.embeds else "pairs"

    @property
    def name(self) -> str:
        return f"{Path(self.folder).name} ({' '.join(filter(None, (self.runtime, self.precision)))})"

    @property
    def limit(self) -> int:
        """Tokens of a text or pair at most."""
        return self.model.settings.max_length if self.embeds else self.model.max_length

    def encoded(self, texts: Sequence[str]) -> list[EncodedPair]:
        """The tokens that `compute` computes, with what stands around them."""
        if self.embeds:
            return self.model.backend.text_encoder.encode(texts, "document")
        return self.model.backend.pair_encoder.encode([(QUERY, text) for text in texts])

    def compute(self, texts: Sequence[str]) -> None:
        if self.embeds:
            representations = self.model.settings.representations
            self.model.encode_documents(texts, outputs=representations, show_progress_bar=False)
        else:
            self.model.compute_score([(QUERY, text) for text in texts])

    def answer(self, query: str, documents: Sequence[str]) -> None:
        """What a user waits for: the query's representation, or the documents reranked."""
        if self.embeds:
            self.model.encode_queries(query, outputs=self.model.settings.representations)
        else:
            self.model.rerank(query, documents)


def exported_kind(folder: str) -> type[OnnxDescription] | None:
    """Of the model that an exported folder holds; None for other folders."""
    kinds = (EmbedderDescription, RerankerDescription)
    return next((kind for kind in kinds if holds(Path(folder).expanduser(), kind)), None)


def is_embedder(folder: str) -> bool:
    exported = exported_kind(folder)
    if exported is not None:
        return exported is EmbedderDescription
    from rag_retrieval.models.open import holds_embedder

    return holds_embedder(ModelFiles(resolve_model_path(folder)))


def run(config: BenchmarkConfig) -> str:
    """Measure, write `config.output`, and return the table."""
    places = [(folder, runtime) for folder in config.model for runtime in runtimes_of(folder, config)]
    memory = [in_own_process(memory_of, *place, config) for place in places]
    subjects = [Subject(*place, config.device) for place in places]
    if len({subject.embeds for subject in subjects}) > 1:
        kinds = ", ".join(
            f"{subject.folder} is {'an embedder' if subject.embeds else 'a reranker'}" for subject in subjects
        )
        raise ValueError(f"model: {kinds}; give models of one kind, whose figures can be compared")
    result = {
        "machine": machine(),
        "unit": subjects[0].unit,
        "models": [
            {"name": subject.name, "folder": subject.folder, "runtime": subject.runtime, **own}
            for subject, own in zip(subjects, memory, strict=True)
        ],
        "throughput": throughput(subjects, config),
        "latency": latency(subjects, config),
    }
    if config.output is not None:
        write_text(Path(config.output), json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    return describe(result)


def runtimes_of(folder: str, config: BenchmarkConfig) -> tuple[str | None, ...]:
    return (None, "openvino") if exported_kind(folder) is not None and config.openvino else (None,)


# ---- texts


def text_of_words(number: int, draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS.split(), k=number))


QUERY = text_of_words(QUERY_WORDS, random.Random(0))


def texts_of(subject: Subject, tokens: int, count: int) -> list[str]:
    """Different texts of as many words as fit into `tokens` tokens of this model, and into its limit."""

    def fits(words: list[str]) -> bool:
        (text,) = subject.encoded([" ".join(words)])
        return len(text) <= tokens and not text.truncated

    draw, texts = random.Random(tokens), []
    for _ in range(count):
        words = text_of_words(tokens, draw).split()
        low, high = 1, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(words[:middle]) else (low, middle - 1)
        texts.append(" ".join(words[:low]))
    return texts


# ---- speed


def turns(subjects: Sequence[Subject], rounds: int) -> Iterator[tuple[int, Subject]]:
    """(place, subject), every other round in reversed order, so that a machine that slows down treats all alike."""
    order = list(enumerate(subjects))
    for number in range(rounds):
        yield from order if number % 2 == 0 else reversed(order)


def timed_calls(call: Callable[[int], object], seconds: float) -> list[float]:
    """Seconds of each call, which gets its number, until all together took `seconds`."""
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return times


def throughput(subjects: Sequence[Subject], config: BenchmarkConfig) -> list[dict[str, Any]]:
    """For each length, batch size and model. Lengths beyond the limit of a model are left out."""
    limit, rows = min(subject.limit for subject in subjects), []
    lengths = [length for length in config.lengths if length <= limit] or [limit]
    cells = [(length, batch) for length in lengths for batch in config.batch_sizes]
    with Progress(len(cells), "measuring", "cells") as progress:
        for length, batch in cells:
            rows += measure_cell(subjects, texts_of(subjects[0], length, batch), config)
            progress.update(1)
    return rows


def measure_cell(subjects: Sequence[Subject], texts: list[str], config: BenchmarkConfig) -> list[dict[str, Any]]:
    """per_second: texts, or pairs; the median of the rounds, and their range."""
    for subject in subjects:
        subject.compute(texts)  # what is prepared once is not measured
    rates: list[list[float]] = [[] for _ in subjects]
    for place, subject in turns(subjects, config.rounds):

        def compute(number: int, subject: Subject = subject) -> None:
            subject.compute(texts)

        times = timed_calls(compute, config.seconds)
        rates[place].append(len(texts) * len(times) / sum(times))
    rows = []
    for place, (subject, own) in enumerate(zip(subjects, rates, strict=True)):
        tokens = sum(map(len, subject.encoded(texts))) / len(texts)
        rate = float(np.median(own))
        rows.append(
            {
                "model": place,
                "tokens": tokens,
                "batch_size": len(texts),
                "per_second": rate,
                "range": [min(own), max(own)],
                "tokens_per_second": rate * tokens,
            }
        )
    return rows


def latency(subjects: Sequence[Subject], config: BenchmarkConfig) -> list[dict[str, float]]:
    """Milliseconds of one query at a time, of every model. A reranker has `config.documents` to put in order, of 128
    tokens with the query, or as many as it takes."""
    draw, tokens = random.Random(1), min(LATENCY_TOKENS, *(subject.limit for subject in subjects))
    queries = [text_of_words(QUERY_WORDS, draw) for _ in range(QUERIES)]
    documents = [] if subjects[0].embeds else texts_of(subjects[0], tokens, config.documents)
    times: list[list[float]] = [[] for _ in subjects]
    for subject in subjects:
        subject.answer(QUERY, documents)
    for place, subject in turns(subjects, config.rounds):

        def answer(number: int, subject: Subject = subject) -> None:
            subject.answer(queries[number % QUERIES], documents)

        times[place] += timed_calls(answer, config.seconds)
    return [
        {"queries": len(own), **{f"p{share}": float(np.percentile(own, share)) * 1e3 for share in (50, 99)}}
        for own in times
    ]


# ---- memory


def in_own_process(function: Callable, *arguments) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def memory_of(folder: str, runtime: str | None, config: BenchmarkConfig) -> dict[str, int]:
    """Bytes: what opening the model and computing the largest of the cells adds to this process at its highest, its
    libraries included, and the files of its folder."""
    before = peak_memory()
    subject = Subject(folder, runtime, config.device)
    longest = min(max(config.lengths), subject.limit)
    subject.compute(texts_of(subject, longest, max(config.batch_sizes)))
    files = (file for file in Path(resolve_model_path(folder)).rglob("*") if file.is_file())
    return {"memory": peak_memory() - before, "size": sum(file.stat().st_size for file in files)}


def peak_memory() -> int:
    """Bytes of this process at its highest. Not by getrusage on Linux: there a process begins with the peak of the one
    that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- what is printed


def machine() -> dict[str, Any]:
    """threads: that one forward uses on the CPU. load: processes that want to run, over 1, 5 and 15 minutes."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"processor": processor(), "threads": default_threads(None), "load": os.getloadavg(), "versions": versions}


def processor() -> str:
    """Its name, and which of the instructions that int8 gains by it has, where Linux says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = dict([part.strip() for part in line.split(":", 1)] for line in reversed(lines) if ":" in line)
    flags = fields.get("flags", fields.get("Features", "")).split()
    found = [flag for flag in INT8_FLAGS if flag in flags]
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} ({', '.join(found) or 'no 8-bit dot products'})" if lines else name


def describe(result: dict[str, Any]) -> str:
    """Two tables, of throughput and of what each model takes. Ratios are to the first model."""
    models, own = result["models"], result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in own["versions"].items())
    parts: list = [f"{own['processor']}, {own['threads']} threads; {versions}\n"]
    parts += [f"[{place}] {model['name']}: {model['folder']}" for place, model in enumerate(models, 1)]
    several, rows, first = len(models) > 1, [], 0.0
    for row in result["throughput"]:
        rate, place = row["per_second"], row["model"]
        first = first if place else rate
        cells = (f"{row['tokens']:.0f}", f"{row['batch_size']}", f"{rate:,.1f}", f"{row['tokens_per_second']:,.0f}")
        rows.append((f"[{place + 1}]", *cells, *([f"{rate / first:.2f}"] if several else [])))
    head = ("", "tokens", "batch", f"{result['unit']} a second", "tokens a second")
    parts += ["", plain_table((*head, *(["times [1]"] if several else [])), rows), ""]
    rows = []
    for place, (model, times) in enumerate(zip(models, result["latency"], strict=True), 1):
        cells = (f"{times['p50']:.1f} ms", f"{times['p99']:.1f} ms", f"{times['queries']:,}")
        rows.append((f"[{place}]", *cells, f"{model['memory'] / MB:,.0f} MB", f"{model['size'] / MB:,.1f} MB"))
    parts.append(plain_table(("", "one query, p50", "p99", "queries", "memory", "folder"), rows))
    return rendered(parts, terminal_columns())
