"""Load on `rag-retrieval serve`: throughput and latency at several concurrencies, then ten times what it can take.

Starts the server as a process of its own and sends made-up requests from this one. Every answer is compared with the
scores of its texts computed alone before. Run: `python benchmarks/serve.py --model DIR`.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count

import httpx
import numpy as np
import psutil

from rag_retrieval import Reranker

MIB = 1 << 20
TOLERANCE = 1e-4  # of a logit: padding and batch sizes change the order of float32 sums
TEXT = "fever cough doctor medicine river bridge train station python returns list water sugar oxygen light music piano"
VOCABULARY = TEXT.split()
LIBRARIES = ("torch", "transformers", "starlette", "uvicorn", "httpx")


@dataclass(frozen=True)
class Question:
    """scores: of the texts, each computed alone: [texts], logits."""

    body: dict
    scores: np.ndarray


@dataclass
class Outcome:
    """What became of the requests of one measurement. seconds: of each that was answered; wrong: answers with other
    scores than those computed alone; failed: connections that broke, and time-outs of the client."""

    sent: int = 0
    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    pairs: int = 0
    wrong: int = 0
    failed: int = 0
    took: float = 0.0

    @property
    def answered(self) -> int:
        return self.statuses[200]

    def percentile(self, share: float) -> float:
        """Milliseconds; NaN without an answer."""
        return float(np.quantile(self.seconds, share)) * 1000 if self.seconds else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a trained reranker")
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--questions", type=int, default=50, help="different requests")
    parser.add_argument("--texts", type=int, default=10, help="of a request, on average")
    parser.add_argument("--words", type=int, default=60, help="of a text, on average")
    parser.add_argument("--times", type=float, default=10.0, help="the overload, as a multiple of the best throughput")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the server")
    options = parser.parse_args()
    print(describe_machine())
    questions = make_questions(options.model, options.questions, options.texts, options.words)
    with server_process(options.model, options.serve) as (address, process):
        asyncio.run(measure(address, process, questions, options))


def describe_machine() -> str:
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{os.cpu_count()} cores, OMP_NUM_THREADS {threads}, Python {platform.python_version()}, {versions}"


def make_questions(model: str, questions: int, texts: int, words: int) -> list[Question]:
    """Of random sizes, from one text to twice `texts`, and of texts from one word to twice `words`. Seeded."""
    generator = np.random.default_rng(0)
    made = []
    with Reranker(model) as reranker:
        for number in range(questions):
            query = f"question {number} about {generator.choice(VOCABULARY)}"
            sizes = generator.integers(1, 2 * words, generator.integers(1, 2 * texts))
            bodies = [" ".join(generator.choice(VOCABULARY, size)) for size in sizes]
            scores = np.concatenate([reranker.compute_score([[query, text]]) for text in bodies])
            made.append(Question({"query": query, "texts": bodies, "raw_scores": True}, scores))
    return made


@contextmanager
def server_process(model: str, options: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a running server, and its process."""
    command = [sys.executable, "-m", "rag_retrieval.cli", "serve", "--model", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield address_in(process.stderr), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.stderr.read()
        assert process.wait(60) == 0, "the server did not end with 0"


def address_in(log) -> str:
    printed = []
    for line in log:
        printed.append(line)
        match = re.search(r"listening on (\S+)", line)
        if match:
            return match[1]
    raise SystemExit("the server did not start:\n" + "".join(printed))


async def measure(address: str, process: psutil.Process, questions: list[Question], options) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as client:
        await closed_loop(client, questions, 4, min(2.0, options.seconds))  # connections, allocator
        print(f"{'':>14} {'requests/s':>10} {'pairs/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'sent':>6} {'answered':>8} "
              f"{'429':>6} {'wrong':>6}")  # fmt: skip
        best = 0.0
        for concurrency in options.concurrencies:
            outcome = await closed_loop(client, questions, concurrency, options.seconds)
            best = max(best, outcome.answered / outcome.took)
            print(row(f"{concurrency} at once", outcome), flush=True)
        await overload(client, process, questions, best * options.times, options.seconds)


def row(name: str, outcome: Outcome) -> str:
    return (
        f"{name:>14} {outcome.answered / outcome.took:>10.1f} {outcome.pairs / outcome.took:>8.0f} "
        f"{outcome.percentile(0.5):>8.0f} {outcome.percentile(0.99):>8.0f} {outcome.sent:>6} {outcome.answered:>8} "
        f"{outcome.statuses[429]:>6} {outcome.wrong:>6}"
    )


async def closed_loop(
    client: httpx.AsyncClient, questions: list[Question], concurrency: int, seconds: float
) -> Outcome:
    """So many clients, each of which asks again as soon as it has its answer."""
    outcome, numbers, started = Outcome(), count(), time.perf_counter()

    async def ask_on() -> None:
        while time.perf_counter() - started < seconds:
            await ask(client, questions[next(numbers) % len(questions)], outcome)

    await asyncio.gather(*[ask_on() for _ in range(concurrency)])
    outcome.took = time.perf_counter() - started
    return outcome


async def open_loop(client: httpx.AsyncClient, questions: list[Question], rate: float, seconds: float) -> Outcome:
    """`rate` requests a second, whether or not earlier ones are answered; less where this process cannot send them."""
    outcome, tasks, started = Outcome(), [], time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        for number in range(len(tasks), int(passed * rate) + 1):
            tasks.append(asyncio.create_task(ask(client, questions[number % len(questions)], outcome)))
        await asyncio.sleep(0.005)
    outcome.took = time.perf_counter() - started
    await asyncio.gather(*tasks)
    return outcome


async def ask(client: httpx.AsyncClient, question: Question, outcome: Outcome) -> None:
    started = time.perf_counter()
    outcome.sent += 1
    try:
        response = await client.post("/rerank", json=question.body)
    except httpx.TransportError:
        outcome.failed += 1
        return
    outcome.statuses[response.status_code] += 1
    if response.status_code == 200:
        outcome.seconds.append(time.perf_counter() - started)
        outcome.pairs += len(question.scores)
        outcome.wrong += not is_right(response.json(), question.scores)


def is_right(answer: list[dict], scores: np.ndarray) -> bool:
    """Whether each text has the score that it has alone, each once and best first."""
    order = [entry["index"] for entry in answer]
    answered = np.array([entry["score"] for entry in answer])
    if sorted(order) != list(range(len(scores))) or (np.diff(answered) > 0).any():
        return False
    return bool(np.allclose(answered, scores[order], rtol=0, atol=TOLERANCE))


async def overload(
    client: httpx.AsyncClient, process: psutil.Process, questions: list[Question], rate: float, seconds: float
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


async def with_memory(process: psutil.Process, work) -> tuple[float, Outcome]:
    """The most memory that the process held while `work` ran, in MiB, and what `work` gave."""
    task, highest = asyncio.create_task(work), 0.0
    while not task.done():
        highest = max(highest, resident(process))
        await asyncio.sleep(0.05)
    return highest, task.result()


def resident(process: psutil.Process) -> float:
    return process.memory_info().rss / MIB


if __name__ == "__main__":
    main()
