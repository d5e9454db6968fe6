"""What the scripts of all trainers share: the table of trainers, the exit code of a run, its errors in one line, and
the end of the process.

Heavy libraries are imported when a run begins: a script must answer `--help` and Ctrl-C at once.
"""

import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from rag_retrieval.core.command import Command, has_home, load_object, report, run_command
from rag_retrieval.core.log import launched_processes, launched_rank
from rag_retrieval.core.signals import Interrupted, TrainingStopped, exit_code, interrupt, leave_at_once, on_signals

KINDS = {"reranker": "a reranker", "embedding": "an embedder", "pretrain": "an encoder on plain texts"}
TRAINERS = {  # by the `task` of a configuration
    task: Command(
        "train",
        f"train {what}; others: {', '.join(f'--task {other}' for other in KINDS if other != task)}",
        config=f"rag_retrieval.train.{task}.config:{task.capitalize()}Config",
        run="rag_retrieval.train.script:train",
        work=(f"rag_retrieval.train.{task}.run",),
        config_folder=Path(__file__).resolve().parent / task / "config",
    )
    for task, what in KINDS.items()
}


def main_of(task: str, arguments: list[str] | None) -> int:
    """What a trainer's script does. Returns the exit code: 0 trained; 1 training failed; 2 a mistake in configuration,
    data or launch; 130 and 143 ended by SIGINT and SIGTERM (in training: after the step, with a checkpoint)."""
    return run_command(TRAINERS[task], sys.argv[1:] if arguments is None else arguments)


def train_any(arguments: list[str]) -> int:
    """`rag-retrieval train`: the trainer that --task or `task` in the file names; the reranker's where none does."""
    with on_signals(leave_at_once):
        from rag_retrieval.core.config_reader import ConfigError, asked_value

        try:
            folders = [trainer.config_folder for trainer in TRAINERS.values()]
            task = asked_value("task", arguments, folders) or "reranker"
            if task not in TRAINERS:
                raise ConfigError(f"task: expected one of {', '.join(TRAINERS)}, found {task}")
        except ConfigError as error:
            return report(error, 2, on_all_processes=True)
    return main_of(task, arguments)


def train(config: Any) -> int:
    """Run the trainer of a `TrainingConfig` and turn its errors into one line and an exit code. An error of ours keeps
    its traceback."""
    run = load_object(f"rag_retrieval.train.{config.task}.run:run")
    from rag_retrieval.core.distributed import PeerError, RankLocalStartError, StartError
    from rag_retrieval.train.failures import peer_failure
    from rag_retrieval.train.launch import LaunchError
    from rag_retrieval.train.task import ProcessFailure, TrainingError

    try:
        with on_signals(interrupt):
            run(config)
    except (LaunchError, StartError) as error:
        return report(error, 2, on_all_processes=not isinstance(error, RankLocalStartError))
    except PeerError as error:
        return report(error, 2, on_all_processes=True)
    except TrainingError as error:
        return report(error, 1, on_all_processes=not isinstance(error, ProcessFailure))
    except TrainingStopped as stop:
        message = f"{stop}; {how_to_continue(config)}"
        return report(InterruptedError(message), exit_code(stop.number), on_all_processes=True)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        message = f"interrupted by {signal.Signals(number).name}; {how_to_continue(config)}"
        return report(InterruptedError(message), exit_code(number), on_all_processes=True)
    except Exception as error:
        if (reason := peer_failure(error, config.wait_minutes)) is not None:
            return report(ConnectionError(reason), 1, on_all_processes=False)
        if isinstance(error, RuntimeError) and not has_home():
            raise
        return report_crash(error, config)
    return 0


def how_to_continue(config: Any) -> str:
    """Whatever command or options began the run: what they came to stands in its folder from the first step on."""
    from rag_retrieval.train.run_folder import CONFIGURATION_FILE

    written = Path(config.output_dir) / CONFIGURATION_FILE
    if written.is_file():
        return f"continue with: rag-retrieval train --config {written} --resume auto"
    return f"continue with --resume auto --output_dir {config.output_dir}"


def report_crash(error: Exception, config: Any) -> int:
    """Print the traceback of an error that is no user's, whole and at once, with the process that it struck."""
    if os.environ.get("RAG_RETRIEVAL_TRACEBACK"):
        raise error
    where = f" in process {launched_rank()}" if launched_processes() > 1 else ""
    text = "".join(traceback.format_exception(error))
    written = any(Path(config.output_dir).glob("checkpoint-*"))
    advice = f"Checkpoints written before are intact; {how_to_continue(config)}\n" if written else ""
    sys.stderr.write(f"error{where}:\n{text}{advice}")
    sys.stderr.flush()
    return 1


def leave(code: int) -> None:
    """End the process. One of several skips the interpreter's teardown: there, a thread of the exchange between
    processes can abort a run whose work is done and saved (seen with DeepSpeed over gloo)."""
    if launched_processes() == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
