"""Train a reranker from a YAML file.

    accelerate launch train_reranker.py --config training_bert.yaml [--any_key value ...]

Run as a script, Python puts this file's folder, not the repository, on the import path; the first lines mend that,
so that an uninstalled checkout works from any folder.
"""

import logging
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from rag_retrieval.records import DataError
from rag_retrieval.train.reranker.config_file import ConfigError, describe_options, load_config

SHIPPED_CONFIGS = Path(__file__).resolve().parent / "config"
USAGE = "usage: train_reranker.py --config FILE [--KEY VALUE ...]"

logger = logging.getLogger("rag_retrieval")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 trained, 2 a mistake in configuration, data or launch, 1 training failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\n\n{describe_options()}")
        return 0 if arguments else 2
    try:
        path, overrides = split_arguments(arguments)
        config = load_config(path, overrides, SHIPPED_CONFIGS)
    except ConfigError as error:
        return report(error)
    set_up_logging()
    from rag_retrieval.train.loop import TrainingError
    from rag_retrieval.train.reranker.run import run

    try:
        run(config)
    except TrainingError as error:
        return report(error, code=1)
    except (DataError, ValueError, OSError) as error:
        if os.environ.get("RAG_RETRIEVAL_TRACEBACK"):
            raise
        return report(error)
    return 0


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """The configuration file's name and the other arguments."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:position] + arguments[position + 1 :]
        if argument == "--config":
            if position + 1 == len(arguments):
                break
            return arguments[position + 1], arguments[:position] + arguments[position + 2 :]
    raise ConfigError(f"--config FILE is missing\n{USAGE}")


def report(error: Exception, code: int = 2) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def set_up_logging() -> None:
    """Our lines on the main process; warnings of other libraries; no progress bar of a loading model."""
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO if main_process else logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
