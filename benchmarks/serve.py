"""Load on `rag-retrieval serve`: throughput and latency at several concurrencies, then ten times what it can take.

Starts the server as a process of its own and sends made-up requests from this one: to rerank (`--model`), for
embeddings (`--embedder`) or to search (`--index`). Every answer is compared with what its texts alone gave before.
`--beside` measures in turns with sentence-transformers behind the simplest server, `--steady` the memory over many
requests. Run: `python benchmarks/serve.py --model DIR`.

Client and server share the machine's cores, so on a small one the figures are a lower bound. Latency at a full
concurrency is mostly queue: requests over capacity wait, whatever the server does.
"""

import argparse
import asyncio
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from rag_retrieval import Embedder, Reranker, Retriever
from rag_retrieval.models.settings import resolve_model_path

MIB = 1 << 20
TOLERANCE = 1e-4  # of a logit or a number of a vector: padding and batch sizes change the order of float32 sums
SEARCH_TOLERANCE = 1e-3  # of a score: the fused score of two that are nearly equal depends on which is first
TOP_K = 10  # documents of a search
ROUNDS = 3  # of both servers, in turns
SIMPLEST = Path(__file__).with_name("simplest_server.py")
TEXT = "fever cough doctor medicine river bridge train station python returns list water sugar oxygen light music piano"
VOCABULARY = TEXT.split()
LIBRARIES = ("torch", "transformers", "sentence-transformers", "starlette", "uvicorn", "aiohttp")


@dataclass(frozen=True)
class Question:
    """texts: how many there are to compute. is_right: whether an answer is that of these texts, each computed alone."""

    path: str
    body: dict
    texts: int
    is_right: Callable[[Any], bool]


@dataclass
class Outcome:
    """What became of the requests of one measurement. seconds: of each that was answered; wrong: answers other than
    those computed alone; failed: connections that broke, and time-outs of the client."""

    sent: int = 0
    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    texts: int = 0
    wrong: int = 0
    failed: int = 0
    took: float = 0.0

    @property
    def answered(self) -> int:
        return self.statuses[200]

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return self.answered / self.took

    def percentile(self, share: float) -> float:
        """Milliseconds; NaN without an answer."""
        return float(np.quantile(self.seconds, share)) * 1000 if self.seconds else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--model", help="folder of a trained reranker")
    kinds.add_argument("--embedder", help="folder of an embedder")
    kinds.add_argument("--index", help="folder of an index")
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--questions", type=int, default=50, help="different requests")
    parser.add_argument("--texts", type=int, default=10, help="of a request, on average; a search has one query")
    parser.add_argument("--words", type=int, default=60, help="of a text, on average")
    parser.add_argument("--times", type=float, default=10.0, help="the overload, as a multiple of the best throughput")
    parser.add_argument("--steady", type=int, default=0, help="requests over which memory is looked at")
    parser.add_argument("--beside", action="store_true", help="measure in turns with sentence-transformers")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the server")
    options = parser.parse_args()
    if options.beside and options.index:
        parser.error("--beside: sentence-transformers has no index; give --model or --embedder")
    print(describe_machine())
    kind = next(name for name in ("model", "embedder", "index") if getattr(options, name))
    folder = getattr(options, kind)
    makers = {"model": rerank_questions, "embedder": embedding_questions, "index": search_questions}
    questions = makers[kind](folder, options.questions, options.texts, options.words)
    ours = [sys.executable, "-m", "rag_retrieval.cli", "serve", f"--{kind}", folder, "--port", "0", *options.serve]
    with server_process(ours) as (address, process):
        if options.beside:
            role = "reranker" if kind == "model" else "embedder"
            with server_process([sys.executable, str(SIMPLEST), role, str(resolve_model_path(folder))]) as (other, _):
                asyncio.run(compare(address, other, questions, options))
        asyncio.run(measure(address, process, questions, options))


def describe_machine() -> str:
    threads, load = os.environ.get("OMP_NUM_THREADS", "all"), os.getloadavg()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    machine = f"{os.cpu_count()} cores (load {load:.1f} before the start), OMP_NUM_THREADS {threads}"
    return f"{machine}, Python {platform.python_version()}, {versions}"


# ---- requests, and what is right ------------------------------------------------------------------------


def made_up_texts(generator: np.random.Generator, texts: int, words: int) -> list[str]:
    """From one text to twice `texts`, of one word to twice `words`; of one text where `texts` is 1."""
    sizes = generator.integers(1, 2 * words, generator.integers(1, 2 * texts))
    return [" ".join(generator.choice(VOCABULARY, size)) for size in sizes]


def rerank_questions(model: str, questions: int, texts: int, words: int) -> list[Question]:
    """Seeded, as all of these."""
    generator = np.random.default_rng(0)
    made = []
    with Reranker(model) as reranker:
        for number in range(questions):
            query = f"question {number} about {generator.choice(VOCABULARY)}"
            bodies = made_up_texts(generator, texts, words)
            scores = np.concatenate([reranker.compute_score([[query, text]]) for text in bodies])
            body = {"query": query, "texts": bodies, "raw_scores": True}
            made.append(Question("/rerank", body, len(bodies), partial(has_scores, scores=scores)))
    return made


def embedding_questions(embedder: str, questions: int, texts: int, words: int) -> list[Question]:
    generator = np.random.default_rng(0)
    made = []
    with Embedder(embedder) as opened:
        for number in range(questions):
            bodies = [f"{number} {text}" for text in made_up_texts(generator, texts, words)]
            vectors = np.stack([opened.encode(text) for text in bodies])
            body = {"model": "any", "input": bodies}
            made.append(Question("/v1/embeddings", body, len(bodies), partial(has_vectors, vectors=vectors)))
    return made


def search_questions(index: str, questions: int, texts: int, words: int) -> list[Question]:
    """Queries are the beginnings of documents of the index."""
    generator = np.random.default_rng(0)
    made = []
    with Retriever(index) as retriever:
        documents = retriever.index.opened.documents
        for row in generator.integers(0, len(documents), questions).tolist():
            query = " ".join(documents.text(row).split()[: max(1, words // 4)]) or "a"
            found = [(result.doc_id, result.score) for result in retriever.search(query, 2 * TOP_K)]
            body = {"query": query, "top_k": TOP_K}
            made.append(Question("/search", body, 1, partial(has_results, found=found)))
    return made


def has_scores(answer: list[dict], scores: np.ndarray) -> bool:
    """Whether each text has the score that it has alone, each once and best first. scores: [texts], logits."""
    order = [entry["index"] for entry in answer]
    answered = np.array([entry["score"] for entry in answer])
    if sorted(order) != list(range(len(scores))) or (np.diff(answered) > 0).any():
        return False
    return bool(np.allclose(answered, scores[order], rtol=0, atol=TOLERANCE))


def has_vectors(answer: dict, vectors: np.ndarray) -> bool:
    """Whether each text has the vector that it has alone, in the order of the request. vectors: [texts, dim]."""
    if [entry["index"] for entry in answer["data"]] != list(range(len(vectors))):
        return False
    rows = [np.array(entry["embedding"]) for entry in answer["data"]]
    return all(
        row.shape == alone.shape and np.allclose(row, alone, rtol=0, atol=TOLERANCE)
        for row, alone in zip(rows, vectors, strict=True)
    )


def has_results(answer: dict, found: list[tuple[str, float]]) -> bool:
    """Whether the best TOP_K are there, best first, with their scores. found: ids and scores, best first, of more."""
    ids, scores = ([entry[key] for entry in answer["results"]] for key in ("id", "score"))
    best, expected = min(TOP_K, len(found)), dict(found)
    if len(set(ids)) != best or (np.diff(scores) > 0).any() or not expected.keys() >= set(ids):
        return False
    of_ids = [expected[each] for each in ids]
    of_ranks = [score for _, score in found[:best]]
    return all(np.allclose(scores, right, rtol=0, atol=SEARCH_TOLERANCE) for right in (of_ids, of_ranks))


# ---- servers and load -----------------------------------------------------------------------------------


@contextmanager
def server_process(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a running server, and its process."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield address_in(process.stderr), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.stderr.read()
        code = process.wait(60)
    assert code in (0, -15), "the server did not end by its signal"


def address_in(log) -> str:
    printed = []
    for line in log:
        printed.append(line)
        match = re.search(r"listening on (\S+)", line)
        if match:
            return match[1]
    raise SystemExit("the server did not start:\n" + "".join(printed))


def client_of(address: str) -> aiohttp.ClientSession:
    """With as many connections as there are requests on the way."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=120)
    return aiohttp.ClientSession(address, connector=connector, timeout=timeout)


async def compare(address: str, other: str, questions: list[Question], options) -> None:
    """Both servers in turns, 16 clients; the idle one only waits. Medians of the rounds."""
    names = ("rag-retrieval serve", "sentence-transformers, one lock")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    async with client_of(address) as ours, client_of(other) as theirs:
        for turn in range(ROUNDS + 1):  # the first warms up
            for name, client in zip(names, (ours, theirs), strict=True):
                outcome = await closed_loop(client, questions, 16, options.seconds)
                if turn:
                    outcomes[name].append(outcome)
    rates = {name: float(np.median([outcome.rate for outcome in each])) for name, each in outcomes.items()}
    print(f"beside each other, 16 clients, {ROUNDS} rounds in turns:")
    for name, each in outcomes.items():
        spread = ", ".join(f"{outcome.rate:.1f}" for outcome in each)
        p50, p99 = (float(np.median([outcome.percentile(share) for outcome in each])) for share in (0.5, 0.99))
        wrong = sum(outcome.wrong for outcome in each)
        print(f"{name:>32}: {rates[name]:.1f} requests/s ({spread}), p50 {p50:.0f} ms, p99 {p99:.0f} ms, {wrong} wrong")
    print(f"{rates[names[0]] / rates[names[1]]:.2f} times its requests a second\n", flush=True)


async def measure(address: str, process: psutil.Process, questions: list[Question], options) -> None:
    async with client_of(address) as client:
        await closed_loop(client, questions, 4, min(2.0, options.seconds))  # connections, allocator
        print(f"{'':>14} {'requests/s':>10} {'texts/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'sent':>6} {'answered':>8} "
              f"{'429':>6} {'wrong':>6}")  # fmt: skip
        best = 0.0
        for concurrency in options.concurrencies:
            outcome = await closed_loop(client, questions, concurrency, options.seconds)
            best = max(best, outcome.rate)
            print(row(f"{concurrency} at once", outcome), flush=True)
        await overload(client, process, questions, best * options.times, options.seconds)
        if options.steady:
            await steady(client, process, questions, options.steady)


def row(name: str, outcome: Outcome) -> str:
    return (
        f"{name:>14} {outcome.rate:>10.1f} {outcome.texts / outcome.took:>8.0f} "
        f"{outcome.percentile(0.5):>8.0f} {outcome.percentile(0.99):>8.0f} {outcome.sent:>6} {outcome.answered:>8} "
        f"{outcome.statuses[429]:>6} {outcome.wrong:>6}"
    )


async def closed_loop(
    client: aiohttp.ClientSession, questions: list[Question], concurrency: int, seconds: float
) -> Outcome:
    """So many clients, each of which asks again as soon as it has its answer."""
    outcome, numbers, started = Outcome(), count(), time.perf_counter()

    async def ask_on() -> None:
        while time.perf_counter() - started < seconds:
            await ask(client, questions[next(numbers) % len(questions)], outcome)

    await asyncio.gather(*[ask_on() for _ in range(concurrency)])
    outcome.took = time.perf_counter() - started
    return outcome


async def open_loop(client: aiohttp.ClientSession, questions: list[Question], rate: float, seconds: float) -> Outcome:
    """`rate` requests a second, whether or not earlier ones are answered; less where this process cannot send them."""
    outcome, tasks, started = Outcome(), [], time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        for number in range(len(tasks), int(passed * rate) + 1):
            tasks.append(asyncio.create_task(ask(client, questions[number % len(questions)], outcome)))
        await asyncio.sleep(0.005)
    outcome.took = time.perf_counter() - started
    await asyncio.gather(*tasks)
    return outcome


async def ask(client: aiohttp.ClientSession, question: Question, outcome: Outcome) -> None:
    started = time.perf_counter()
    outcome.sent += 1
    try:
        async with client.post(question.path, json=question.body) as response:
            answer = await response.json() if response.status == 200 else await response.read()
    except (aiohttp.ClientError, TimeoutError):
        outcome.failed += 1
        return
    outcome.statuses[response.status] += 1
    if response.status == 200:
        outcome.seconds.append(time.perf_counter() - started)
        outcome.texts += question.texts
        outcome.wrong += not question.is_right(answer)


async def overload(
    client: aiohttp.ClientSession, process: psutil.Process, questions: list[Question], rate: float, seconds: float
) -> None:
    """Twice, since the first time fills the allocator's pools."""
    print(f"\noverload: {rate:.0f} requests/s asked for; server's memory before: {resident(process):.0f} MiB")
    for turn in ("first", "second"):
        highest, outcome = await with_memory(process, open_loop(client, questions, rate, seconds))
        others = {status: number for status, number in outcome.statuses.items() if status not in (200, 429)}
        print(
            f"{turn:>7}: {outcome.sent} sent ({outcome.sent / outcome.took:.0f}/s), {outcome.answered} answered, "
            f"{outcome.statuses[429]} refused with 429, {outcome.failed} connections failed, others {others}, "
            f"{outcome.wrong} wrong; answered p50 {outcome.percentile(0.5):.0f} ms, p99 {outcome.percentile(0.99):.0f} "
            f"ms; memory at most {highest:.0f} MiB, after {resident(process):.0f} MiB",
            flush=True,
        )
    after = await closed_loop(client, questions, 1, min(5.0, seconds))
    print(row("1, afterwards", after))


async def steady(
    client: aiohttp.ClientSession, process: psutil.Process, questions: list[Question], requests: int
) -> None:
    """16 clients until so many requests are answered, with the memory after each tenth of them."""
    total, memory = Outcome(), [resident(process)]
    while total.answered < requests:
        part, numbers = Outcome(), iter(range(total.sent, total.sent + max(1, requests // 10)))

        async def ask_on(numbers=numbers, part=part) -> None:
            for number in numbers:
                await ask(client, questions[number % len(questions)], part)

        await asyncio.gather(*[ask_on() for _ in range(16)])
        total.sent, total.wrong, total.failed = (
            total.sent + part.sent, total.wrong + part.wrong, total.failed + part.failed
        )  # fmt: skip
        total.statuses += part.statuses
        memory.append(resident(process))
    lost = total.sent - total.statuses.total()
    shown = ", ".join(f"{each:.0f}" for each in memory)
    print(
        f"{total.answered} requests answered of {total.sent}, {lost} lost, {total.wrong} wrong; memory in MiB after "
        f"each tenth: {shown}; {memory[-1] - memory[1]:+.1f} from the first tenth to the last",
        flush=True,
    )


async def with_memory(process: psutil.Process, work) -> tuple[float, Outcome]:
    """The most memory that the process held while `work` ran, in MiB, and what `work` gave."""
    task, highest = asyncio.create_task(work), 0.0
    while not task.done():
        highest = max(highest, resident(process))
        await asyncio.sleep(0.05)
    return highest, task.result()


def resident(process: psutil.Process) -> float:
    """MiB, with those of its workers."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / MIB


if __name__ == "__main__":
    main()
