"""Train a reranker from a YAML file.

    accelerate launch train_reranker.py --config training_bert.yaml [--any_key value ...]

Run as a script, Python puts this file's folder, not the repository, on the import path; the first lines mend
that, so that an uninstalled checkout works from any folder. Everything but the standard library is imported in
`main`, where a Ctrl-C is already looked after.
"""

import logging
import os
import signal
import sys
import traceback
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from rag_retrieval.core.command import Command, has_home, report, run_command
from rag_retrieval.core.log import launched_rank
from rag_retrieval.core.signals import Interrupted, TrainingStopped, exit_code, interrupt, on_signals

SHIPPED_CONFIGS = Path(__file__).resolve().parent / "config"


TRAIN = Command(
    "train",
    "train a reranker from a YAML file",
    config="rag_retrieval.train.reranker.config:RerankerConfig",
    run="rag_retrieval.train.reranker.train_reranker:train",
    work=("rag_retrieval.train.reranker.run",),
    config_folder=SHIPPED_CONFIGS,
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 trained; 1 training failed; 2 a mistake in configuration, data or launch; 130 and 143
    ended by SIGINT and SIGTERM (in training: after the step, with a checkpoint)."""
    return run_command(TRAIN, sys.argv[1:] if arguments is None else arguments)


def train(config) -> int:
    """Run the training and turn its errors into one line and an exit code. An error of ours keeps its traceback."""
    from rag_retrieval.core.distributed import PeerError, RankLocalStartError, StartError
    from rag_retrieval.train.failures import peer_failure
    from rag_retrieval.train.launch import LaunchError
    from rag_retrieval.train.reranker.run import run
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
        return report(InterruptedError(f"{stop}; {go_on(config)}"), exit_code(stop.number), on_all_processes=True)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        message = f"interrupted by {signal.Signals(number).name}; {go_on(config)}"
        return report(InterruptedError(message), exit_code(number), on_all_processes=True)
    except Exception as error:
        if (reason := peer_failure(error, config.wait_minutes)) is not None:
            return report(ConnectionError(reason), 1, on_all_processes=False)
        if isinstance(error, RuntimeError) and not has_home():
            raise
        return report_crash(error, go_on(config))
    return 0


def go_on(config) -> str:
    """How to resume, whatever command or options began the run."""
    from rag_retrieval.train.run_folder import CONFIGURATION_FILE

    written = Path(config.output_dir) / CONFIGURATION_FILE
    if written.is_file():
        return f"go on with: rag-retrieval train --config {written} --resume auto"
    return f"go on with --resume auto --output_dir {config.output_dir}"


def report_crash(error: Exception, advice: str) -> int:
    """Print the traceback of an error that is no user's, whole and at once, with the process that it struck."""
    if os.environ.get("RAG_RETRIEVAL_TRACEBACK"):
        raise error
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(f"error in process {launched_rank()}:\n{text}Checkpoints written before are intact; {advice}\n")
    sys.stderr.flush()
    return 1


def leave(code: int) -> None:
    """End the process. One of several skips the interpreter's teardown: there, a thread of the exchange between
    processes can abort a run whose work is done and saved (seen with DeepSpeed over gloo)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
