"""What the commands share: how they read their options, how they log and how they end with an error.

The trap: under a launcher every process runs the command, and a launcher ends all of them as soon as one has ended.
Nothing here imports anything heavy before it is called.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rag_retrieval.core.config_file import ConfigError, load_config, split_arguments
from rag_retrieval.core.config_schema import Schema, describe_options

GRACE = 5.0  # seconds in which the first process prints what went wrong


def run_command(schema: Schema, usage: str, arguments: list[str], run: Callable[[Any], int]) -> int:
    """What `run` returns for the configuration that the arguments give; 0 after the help that was asked for; 2 after a
    mistake in the options."""
    if {"-h", "--help"} & set(arguments):
        print(f"{usage}\n\n{describe_options(schema)}")
        return 0
    try:
        path, overrides = split_arguments(arguments)
        config = load_config(schema, path, overrides)
    except ConfigError as error:
        return report(error, 2, on_all_processes=True)
    set_up_logging()
    return run(config)


def report(error: Exception, code: int, on_all_processes: bool) -> int:
    """Print the error, once where all processes have it, and return the exit code. With RAG_RETRIEVAL_TRACEBACK=1 in
    the environment, raise it instead."""
    if os.environ.get("RAG_RETRIEVAL_TRACEBACK"):
        raise error
    process, message = os.environ.get("RANK", "0"), described(error)
    if process == "0":
        print(f"error: {message}", file=sys.stderr)
    elif on_all_processes:
        time.sleep(GRACE)
    else:
        print(f"error in process {process}: {message}", file=sys.stderr)
    return code


def described(error: Exception) -> str:
    """The message; that of the system about a file with the file first and with what to look at."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}: {error.strerror}; check the path, its rights and the room on the disk"


def set_up_logging() -> None:
    """Our lines on the main process; warnings of other libraries; no progress bar of a loading model."""
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("rag_retrieval").setLevel(logging.INFO if main_process else logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
