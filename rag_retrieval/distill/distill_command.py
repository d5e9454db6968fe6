"""`rag-retrieval distill --config FILE [--KEY VALUE ...]`: a teacher's scores for the pairs of a training file.

The trap: an interrupted run has written no output, but its finished parts lie beside it, and the same command goes on
with them.
"""

import os
import signal
import sys
import time

from rag_retrieval.core.command import report, run_command
from rag_retrieval.core.signals import Interrupted, exit_code, interrupt, on_signals
from rag_retrieval.distill.distill_config import DISTILLING, DistillConfig

USAGE = "usage: rag-retrieval distill [--config FILE] [--KEY VALUE ...]"
GO_ON = "the same command goes on where this one stopped"


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 written; 1 a teacher failed; 2 a mistake in configuration, data or teachers; 130 and 143
    ended by SIGINT and SIGTERM. With RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    return run_command(DISTILLING, USAGE, arguments, run)


def run(config: DistillConfig) -> int:
    from rag_retrieval.core.distributed import PeerError
    from rag_retrieval.distill.run import distill
    from rag_retrieval.distill.teachers import TeacherError

    started = time.monotonic()
    try:
        with on_signals(interrupt):
            summary = distill(config)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        return report(InterruptedError(f"interrupted; {GO_ON}"), exit_code(number), on_all_processes=True)
    except (ValueError, OSError) as error:
        return report(error, 2, on_all_processes=False)
    except TeacherError as error:
        return report(error, 1, on_all_processes=False)
    except PeerError as error:
        return report(error, 2, on_all_processes=True)
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.output}: {summary.describe()}")
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0
