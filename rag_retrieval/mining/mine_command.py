"""`rag-retrieval mine [--config FILE] [--KEY VALUE ...]`: hard negatives from a YAML file, options, or both.

The trap: an interrupted run has written no output, but its work folder is there, and the same command goes on
with it. Whoever changes a setting in between gets what the new settings say, never a mixture.
"""

import signal
import sys
import time

from rag_retrieval.core.command import report, run_command
from rag_retrieval.core.signals import Interrupted, exit_code, interrupt, on_signals
from rag_retrieval.mining.mining_checks import summary_file
from rag_retrieval.mining.mining_config import MINING, MiningConfig

USAGE = "usage: rag-retrieval mine [--config FILE] [--KEY VALUE ...]"


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 written; 2 a mistake in configuration, data or models; 130 and 143 ended by SIGINT
    and SIGTERM. With RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    return run_command(MINING, USAGE, arguments, run)


def run(config: MiningConfig) -> int:
    from rag_retrieval.mining.run import mine

    started = time.monotonic()
    try:
        with on_signals(interrupt):
            summary = mine(config)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        message = f"interrupted by {signal.Signals(number).name}; the same command goes on where this one stopped"
        return report(InterruptedError(message), exit_code(number), on_all_processes=False)
    except (ValueError, OSError) as error:
        return report(error, 2, on_all_processes=False)
    print(f"{config.output}: {summary.lines:,} lines in {time.monotonic() - started:.0f} s")
    print(summary.describe(config.num_negatives))
    print(f"the same as JSON: {summary_file(config.output)}", file=sys.stderr)
    return 0
