"""`rag-retrieval serve --model DIR`: from options to a server that listens.

The order matters: a wrong option, token or port is told before the model is loaded, and the port is opened after the
model has scored its first pairs, so that whoever reaches the server finds it ready.
"""

import ipaddress
import logging
from pathlib import Path

from rag_retrieval.command import report, set_up_logging
from rag_retrieval.config_file import ConfigError, load_config, split_arguments
from rag_retrieval.config_schema import describe_options
from rag_retrieval.serve.serve_config import SERVE, TOKEN_VARIABLE, ServeConfig

USAGE = "usage: rag-retrieval serve --model DIR [--config FILE] [--KEY VALUE ...]"
CPU_BATCH_TOKENS = 4096  # two forwards of the size that suits a CPU's caches
GPU_BATCH_TOKENS = 65_536

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 stopped by SIGTERM or Ctrl-C; 2 for a mistake in options, token, port or model; 130 for
    Ctrl-C before it listened. With RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\n\n{describe_options(SERVE)}")
        return 0 if arguments else 2
    try:
        path, overrides = split_arguments(arguments)
        config = load_config(SERVE, path, overrides)
    except ConfigError as error:
        return report(error, 2, on_all_processes=False)
    set_up_logging()
    return run(config)


def run(config: ServeConfig) -> int:
    try:
        serve(config)
    except KeyboardInterrupt:
        return report(InterruptedError("interrupted before the server listened"), 130, on_all_processes=False)
    except ImportError as error:
        message = f"{error}; run: pip install 'rag-retrieval[serve]'"
        return report(ImportError(message), 2, on_all_processes=False)
    except (ValueError, OSError) as error:
        return report(error, 2, on_all_processes=False)
    return 0
