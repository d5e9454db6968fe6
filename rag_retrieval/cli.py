"""The command `rag-retrieval`: one subcommand for each thing that the package does.

A subcommand's module is imported only when it is called, so that `--help` and mistakes answer at once.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable

MODULES = {  # each has main(arguments) -> exit code
    "train": "rag_retrieval.train.reranker.train_reranker",
    "evaluate": "rag_retrieval.evaluate.evaluate_command",
    "mine": "rag_retrieval.mining.mine_command",
    "distill": "rag_retrieval.distill.distill_command",
    "export": "rag_retrieval.export.export_command",
    "serve": "rag_retrieval.serve.serve_command",
    "push": "rag_retrieval.export.push_command",
    "quickstart": "rag_retrieval.quickstart",
}

HELP = """usage: rag-retrieval COMMAND [options]

  train --config FILE [--KEY VALUE ...]   train a reranker from a YAML file (train --help lists every key)
  evaluate --model DIR --data DIR         measure a reranker on judged queries (evaluate --help lists every key)
  mine [--config FILE] [--KEY VALUE ...]  find hard negatives in a corpus (mine --help lists every key)
  distill --config FILE [--KEY VALUE ...] let a teacher score training pairs (distill --help lists every key)
  export --model DIR --output DIR         write a trained reranker as ONNX (export --help lists every key)
  serve --model DIR [--KEY VALUE ...]     answer rerank requests over HTTP (serve --help lists every key)
  push --model DIR --repo_id ORG/NAME     upload a model with its card to a hub (push --help lists every key)
  quickstart [--output_dir DIR]           train on the example data and show what it brought
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else None
    if command in MODULES:
        return until_nobody_reads(importlib.import_module(MODULES[command]).main, arguments[1:])
    if command in ("-h", "--help"):
        print(HELP)
        return 0
    problem = f"unknown command {command!r}" if command else "a command is missing"
    print(f"error: {problem}\n\n{HELP}", file=sys.stderr)
    return 2


def until_nobody_reads(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit code; that of SIGPIPE where the reader of the output is gone, as after `| head`."""
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # what is still buffered would be written, and fail, at the end of Python
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
