"""One training run that is hurt as planned: by a signal, a kill, a full disk, an exception, at a moment of a phase.

    torchrun --nproc_per_node 2 benchmarks/fault_runs.py CONFIG.yaml '{"phase": "saving", "do": "kill", ...}'

The processes are those of the launcher and of `rag-retrieval train`, but forked from one that has imported everything:
imports take longer than a run of the tiny model, and there are a hundred runs.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rag_retrieval.train.checkpoints import CheckpointStore, Saver
from rag_retrieval.train.embedding import run as _embedding  # noqa: F401  imported before the fork
from rag_retrieval.train.embedding.task import EmbeddingTask
from rag_retrieval.train.loop import Trainer
from rag_retrieval.train.pretrain import run as _pretrain  # noqa: F401
from rag_retrieval.train.pretrain.task import PretrainTask
from rag_retrieval.train.reranker import run as _reranker  # noqa: F401
from rag_retrieval.train.reranker.task import RerankerTask
from rag_retrieval.train.script import leave, train_any

PHASES = {
    "step": (Trainer, "train_step"),
    "saving": (Saver, "_write"),
    "rotation": (CheckpointStore, "_rotate"),  # on the main process alone
    "evaluation": (Trainer, "evaluate"),
    "the end": (Trainer, "_finish"),
}
SLOW = 0.2  # seconds that a slow process loses in each step
FILE_LIMIT = 30_000  # bytes, less than the weights of the tiny model
PATIENCE = 600.0  # seconds until a run counts as hanging


@dataclass(frozen=True)
class Fault:
    """What happens to the processes `ranks`: `do` at the `call`-th time (from 1) that they come to `phase`.

    delay: seconds after the phase began, for a kill, which a thread of its own then does.
    """

    do: str
    phase: str = "step"
    call: int = 1
    delay: float = 0.0
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Outcome:
    code: int  # of the launcher; negative: the signal that killed it
    seconds: float
    log: str
    hung: bool


# --- in the processes of the run ---


def hurt(fault: Fault) -> None:
    """Wrap the phase, in this process, so that the fault happens in it."""
    if int(os.environ.get("RANK", "0")) not in fault.ranks:
        return
    owner, name = PHASES[fault.phase]
    function, calls = getattr(owner, name), []

    def hurting(*arguments):
        calls.append(1)
        if fault.do == "slow":
            time.sleep(SLOW)
        elif len(calls) == fault.call:
            DEEDS[fault.do](fault)
        return function(*arguments)

    setattr(owner, name, hurting)


def kill_later(fault: Fault, kill: Callable[[], None]) -> None:
    if fault.delay:
        threading.Timer(fault.delay, kill).start()
    else:
        kill()


def kill_one(fault: Fault) -> None:
    kill_later(fault, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_all(fault: Fault) -> None:
    """All of the run, launcher and data loading processes included: they share a process group."""
    kill_later(fault, lambda: os.killpg(0, signal.SIGKILL))


def kill_loader(fault: Fault) -> None:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def fill_disk(fault: Fault) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))


def spoil_loss(fault: Fault) -> None:
    loss_sums = RerankerTask.loss_sums
    RerankerTask.loss_sums = lambda task, model, batch: loss_sums(task, model, batch) * torch.nan
    gradients_at = EmbeddingTask.gradients_at

    def spoilt(*arguments):
        gradients, loss = gradients_at(*arguments)
        return {name: gradient * torch.nan for name, gradient in gradients.items()}, loss * torch.nan

    EmbeddingTask.gradients_at = spoilt
    noted = PretrainTask.noted
    PretrainTask.noted = lambda task, sums, batch: noted(task, sums, batch) * torch.nan


def remove_folder(fault: Fault) -> None:
    folder = Path(os.environ["FAULT_OUTPUT_DIR"])
    folder.rename(folder.with_name(folder.name + "-gone"))


def fail(fault: Fault) -> None:
    raise RuntimeError("injected by the fault harness")


DEEDS: dict[str, Callable[[Fault], None]] = {
    "kill one": kill_one,
    "kill all": kill_all,
    "kill a data loader": kill_loader,
    "SIGTERM to one": lambda fault: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT to one": lambda fault: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM to the launcher": lambda fault: os.kill(os.getppid(), signal.SIGTERM),
    "full disk": fill_disk,
    "folder gone": remove_folder,
    "NaN in a batch": spoil_loss,
    "exception": fail,
    "stop one": lambda fault: os.kill(os.getpid(), signal.SIGSTOP),
}


def train_hurt(config: Path, options: tuple[str, ...], fault: Fault | None) -> None:
    """The command `rag-retrieval train --config CONFIG OPTIONS`; it leaves the process unless it succeeded."""
    os.environ["FAULT_OUTPUT_DIR"] = json.loads(config.read_text())["output_dir"]
    if fault is not None:
        hurt(fault)
    code = train_any(["--config", str(config), *options])
    if code:
        leave(code)
        os._exit(code)


# --- the launcher ---


def launch(processes: int, config: Path, options: tuple[str, ...], fault: Fault | None) -> None:
    """In a process of its own: torchrun's launcher for several processes, none for one."""
    if processes == 1:
        train_hurt(config, options, fault)
        return
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    elastic_launch(settings, train_hurt)(config, options, fault)


def start(processes: int, config: Path, log: Path, *options: str, fault: Fault | None = None) -> Outcome:
    """Run to the end, as a group of processes of its own; whatever still runs after PATIENCE is killed."""
    began = time.monotonic()
    child = multiprocessing.get_context("fork").Process(
        target=_in_own_group, args=(log, processes, config, options, fault)
    )
    child.start()
    while child.exitcode is None and time.monotonic() < began + PATIENCE:
        time.sleep(0.02)  # join would wait for its data loading processes as well, up to five seconds
    hung, seconds = child.exitcode is None, time.monotonic() - began
    _kill_group(child.pid)  # a killed launcher leaves its processes behind, as it does for users
    child.join()
    return Outcome(child.exitcode, seconds, log.read_text(errors="replace"), hung)


def _in_own_group(log: Path, *arguments) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)  # torch read OMP_NUM_THREADS before the fork
    launch(*arguments)


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    train_hurt(Path(sys.argv[1]), tuple(sys.argv[3:]), Fault(**given | {"ranks": tuple(given["ranks"])}))
    leave(0)
