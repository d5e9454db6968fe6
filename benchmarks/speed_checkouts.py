"""Sides of `speed.py` that are checkouts of this project, such as a git worktree of an older commit, each in a process
of its own: two versions of one package cannot be imported together.

A checkout is driven by its own `benchmarks/speed_works.py`. Where one takes part, ours runs in the same way, so that
both begin with nothing warm.
"""

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from speed_training import Job, Took

CODE = """
import pickle, sys
from pathlib import Path
checkout, folder = map(Path, sys.argv[1:])
sys.path[:0] = [str(checkout), str(checkout / "benchmarks")]
import torch, speed_works, speed_training
job, training, arguments, threads = pickle.loads((folder / "request").read_bytes())
torch.set_num_threads(threads)
scores = None
if training:
    took = speed_training.train_ours(job, *arguments)
else:
    took, scores = speed_works.time_calls(job, speed_works.our_scorer(job), *arguments)
answer = (took.seconds, took.cpu_seconds, took.peak_bytes), scores
(folder / "answer").write_bytes(pickle.dumps(answer))
"""


def train_checkout(checkout: Path, job: Job, first: int, steps: int) -> Took:
    """As `train_ours`."""
    return _run(checkout, job, True, (first, steps))[0]


def score_checkout(checkout: Path, job: Job, pairs: list[tuple[str, str]], repeats: int) -> tuple[Took, torch.Tensor]:
    """As `time_calls` of `our_scorer`."""
    return _run(checkout, job, False, (pairs, repeats))


def _run(checkout: Path, job: Job, training: bool, arguments: tuple):
    with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
        request = (job, training, arguments, torch.get_num_threads())
        Path(folder, "request").write_bytes(pickle.dumps(request))
        command = [sys.executable, "-c", CODE, str(checkout.resolve()), folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{checkout}: the side ended with {done.returncode}:\n{done.stderr[-2000:]}")
        took, scores = pickle.loads(Path(folder, "answer").read_bytes())
    return Took(*took), scores
