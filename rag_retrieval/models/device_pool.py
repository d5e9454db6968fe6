"""Scoring on several devices: a process for each, with its own copy of the model, kept for further calls.

Pairs are dealt in small tasks as the processes become free, longest texts first, so that no device waits long
for another. What a reader would get wrong: a copy does not follow the model in this process, so a pool is good
only for the weights that it was started with (`weights_of`), and a changed model gets a new pool.
"""

import multiprocessing
import signal
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from rag_retrieval.models.one_ahead import one_ahead
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.scoring import (
    SCORING_CHUNK,
    Pairs,
    ScoringOptions,
    encoder_for,
    mode_of,
    score_chunk,
)

if TYPE_CHECKING:
    from rag_retrieval.models.pair_scorer import PairScorer

TASKS_PER_DEVICE = 8  # so that the last tasks, when some devices have nothing left, are short
SMALLEST_TASK = 64  # pairs
DEALT_AHEAD = 2  # tasks: one is tokenized while the other is scored
READY = "ready"
PATIENCE = 5  # seconds for a process that ends


@dataclass(frozen=True)
class Failure:
    """What a process sends in place of scores, before it ends."""

    traceback: str


def weights_of(scorer: "PairScorer") -> list[tuple]:
    """What changes when a weight does: address, version and norm of every tensor.

    Fused optimizers and `.data` write without a new version, so the norms are needed: reading every weight once is
    the memory traffic of one forward.
    """
    tensors = [*scorer.parameters(), *scorer.buffers()]
    norms = [
        torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)
        for tensor in tensors
        if tensor.is_floating_point()
    ]
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors] + torch.stack(norms).tolist()


def pool_for(scorer: "PairScorer", devices: list[torch.device], pool: "DevicePool | None") -> "DevicePool":
    """The given pool where it still serves this scorer on these devices, else a new one in its place."""
    weights = weights_of(scorer)
    if pool is not None:
        if pool.serves(scorer, devices, weights):
            return pool
        pool.close()
    return DevicePool(scorer, devices, weights)


class DevicePool:
    """One process for each device, each with a copy of the scorer. Ends with `close`, when it is collected, or with
    the program."""

    def __init__(self, scorer: "PairScorer", devices: list[torch.device], weights: list[tuple]):
        self.devices, self.weights, self.encoder = devices, weights, scorer.pair_encoder
        self.workers: list[Worker] = []
        self.close = weakref.finalize(self, end_all, self.workers)
        threads = max(1, torch.get_num_threads() // len(devices))
        # a file, not a pipe: CPU processes map it and share its pages
        with tempfile.TemporaryDirectory(prefix="rag-retrieval-") as folder:
            file = Path(folder) / "scorer.pt"
            torch.save(scorer, file)
            try:
                self.workers += [Worker(file, device, threads) for device in devices]
                for worker in self.workers:
                    worker.wait_until_ready()
            except BaseException:
                self.close()
                raise

    def serves(self, scorer: "PairScorer", devices: list[torch.device], weights: list[tuple]) -> bool:
        """Whether it runs, on these devices, with these weights and this encoder of pairs."""
        same = (self.devices, self.weights) == (devices, weights) and self.encoder is scorer.pair_encoder
        return self.close.alive and same

    def score(self, pairs: Pairs | Sequence[EncodedPair], options: ScoringOptions, bar: tqdm) -> torch.Tensor:
        """Scores in the order of pairs: [pairs], float32, on the CPU. Pairs that are encoded already stay as they are.

        Raises RuntimeError when a process fails or dies; the pool is closed then, as it is on an interrupt.
        """
        scores = torch.empty(len(pairs))
        try:
            for positions, values in self._results(pairs, options):
                scores[positions] = values
                bar.update(len(positions))
        except BaseException:
            self.close()
            raise
        return scores

    def _results(self, pairs: Pairs, options: ScoringOptions):
        tasks = deque(tasks_of(pairs, len(self.workers)))
        for worker in self.workers:
            worker.begin(options)
        for _ in range(DEALT_AHEAD):
            for worker in self.workers:
                worker.deal(pairs, tasks)
        while busy := {worker.connection: worker for worker in self.workers if worker.dealt}:
            for connection in wait(list(busy)):
                yield busy[connection].result()
                busy[connection].deal(pairs, tasks)


def tasks_of(pairs: Pairs | Sequence[EncodedPair], devices: int) -> list[list[int]]:
    """Positions of pairs of similar length, longest first. Characters stand for tokens that are not known yet."""
    size = -(-len(pairs) // (devices * TASKS_PER_DEVICE))
    size = min(max(size, SMALLEST_TASK), SCORING_CHUNK)
    order = sorted(range(len(pairs)), key=lambda position: -length_of(pairs[position]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def length_of(pair: tuple[str, str] | EncodedPair) -> int:
    return len(pair) if isinstance(pair, EncodedPair) else sum(map(len, pair))


class Worker:
    """This process's end of one process: what was dealt to it, and its answers, in the order dealt."""

    def __init__(self, file: Path, device: torch.device, threads: int):
        context = multiprocessing.get_context("spawn")  # a fork would share threads and CUDA with this process
        self.device = device
        self.dealt: deque[list[int]] = deque()
        self.connection, theirs = context.Pipe()
        arguments = (theirs, file, device, threads)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # else the connection would outlive the process, and its death go unnoticed

    def wait_until_ready(self) -> None:
        self._receive(
            "before it was ready; a script that passes devices must be a file and keep its work under "
            '`if __name__ == "__main__":`, since every process imports it. See above for its own message'
        )

    def begin(self, options: ScoringOptions) -> None:
        self.dealt.clear()
        self.ended = False
        self._send(options)

    def deal(self, pairs: Pairs, tasks: deque[list[int]]) -> None:
        """Send the next task or, once, that there is none."""
        if tasks:
            self.dealt.append(tasks.popleft())
            self._send([pairs[position] for position in self.dealt[-1]])
        elif not self.ended:
            self.ended = True
            self._send(None)

    def result(self) -> tuple[list[int], torch.Tensor]:
        scores = self._receive("while scoring; an end by signal 9 is often a lack of memory")
        return self.dealt.popleft(), torch.from_numpy(scores)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(PATIENCE)

    def _send(self, message) -> None:
        try:
            self.connection.send(message)
        except OSError:
            self._receive("while scoring")  # its last words, if there are any

    def _receive(self, when: str):
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            code = self.process.exitcode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
            raise RuntimeError(f"the process for {self.device} ended {how} {when}") from None
        if isinstance(message, Failure):
            raise RuntimeError(f"the process for {self.device} failed:\n{message.traceback}")
        return message


def end_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.end()


def serve(connection: Connection, file: Path, device: torch.device, threads: int) -> None:
    """The life of a process: load, say so, then one call after another until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the first process, which ends this one
    try:
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        scorer = torch.load(file, map_location="cpu", mmap=True, weights_only=False).to(device)
        connection.send(READY)
        while True:
            serve_call(connection, scorer)
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        connection.send(Failure(traceback.format_exc()))


def serve_call(connection: Connection, scorer: "PairScorer") -> None:
    """Take the options, then lists of pairs until None comes; answer each with its scores: [pairs], float32."""
    options = connection.recv()
    encoder = encoder_for(scorer, options.max_length)

    def encode(task: Pairs | Sequence[EncodedPair]) -> Sequence[EncodedPair]:
        return task if isinstance(task[0], EncodedPair) else encoder.encode(task)

    tasks = iter(connection.recv, None)
    with mode_of(scorer, options.precision), closing(one_ahead(encode, tasks)) as chunks:
        for encoded in chunks:
            scores = score_chunk(scorer, encoded, options.batch_size, tqdm(disable=True))
            connection.send(scores.numpy())  # a tensor would travel through shared memory, which may be small
