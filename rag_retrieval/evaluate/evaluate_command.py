"""`rag-retrieval evaluate`: the command around `evaluate_reranker`.

The trap: under a launcher every process runs this. Only the main one prints and writes.
"""

import os
import shutil

from rag_retrieval.core.command import report, run_command
from rag_retrieval.evaluate.evaluation_config import EVALUATION, EvaluationConfig

USAGE = "usage: rag-retrieval evaluate --model DIR --data DIR [--config FILE] [--KEY VALUE ...]"
COLUMNS = 100  # columns where the output is no terminal


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for a mistake in options, model or data; 130 for Ctrl-C. With
    RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    return run_command(EVALUATION, USAGE, arguments, run)


def run(config: EvaluationConfig) -> int:
    try:
        evaluate(config)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from what is scored"
        return report(InterruptedError(message), 130, on_all_processes=True)
    except ImportError as error:
        message = f"{error}; run: pip install -e '.[evaluate,report]'"
        return report(ImportError(message), 2, on_all_processes=True)
    except (ValueError, OSError) as error:
        return report(error, 2, on_all_processes=False)
    return 0


def evaluate(config: EvaluationConfig) -> None:
    from rag_retrieval.evaluate.evaluation import evaluate_reranker
    from rag_retrieval.evaluate.output import describe_evaluation, write_evaluation

    evaluation = evaluate_reranker(config)
    if os.environ.get("RANK", "0") != "0":
        return
    write_evaluation(evaluation)
    if config.report:
        from rag_retrieval.evaluate.report import write_report

        write_report(evaluation)
    print(describe_evaluation(evaluation, shutil.get_terminal_size((COLUMNS, 24)).columns))
