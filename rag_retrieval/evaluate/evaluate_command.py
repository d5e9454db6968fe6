"""`rag-retrieval evaluate`: the command around `evaluate_reranker`.

The trap: under a launcher every process runs this. Only the main one prints and writes.
"""

import logging
import os
import shutil
import sys

from rag_retrieval.evaluate.evaluation_config import describe_options, load_evaluation_config

COLUMNS = 100  # columns where the output is no terminal


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for a mistake in options, model or data; 130 for Ctrl-C. With
    RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(describe_options())
        return 0 if arguments else 2
    set_up_logging()
    try:
        run(arguments)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("RAG_RETRIEVAL_TRACEBACK"):
            raise
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is scored", file=sys.stderr)
        return 130
    return 0


def run(arguments: list[str]) -> None:
    config = load_evaluation_config(arguments)
    from rag_retrieval.evaluate.evaluation import evaluate_reranker
    from rag_retrieval.evaluate.evaluation_output import describe_evaluation, write_evaluation

    evaluation = evaluate_reranker(config)
    if os.environ.get("RANK", "0") != "0":
        return
    write_evaluation(evaluation)
    if config.report:
        from rag_retrieval.evaluate.report import write_report

        write_report(evaluation)
    print(describe_evaluation(evaluation, shutil.get_terminal_size((COLUMNS, 24)).columns))


def describe_error(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error}; run: pip install 'rag-retrieval[evaluate,report]'"
    return str(error)


def set_up_logging() -> None:
    """Our lines on the main process; of other libraries warnings, and no bar of a loading model."""
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("rag_retrieval").setLevel(logging.INFO if main_process else logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
