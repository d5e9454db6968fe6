"""Train a reranker from a YAML file.

    accelerate launch train_reranker.py --config training_bert.yaml [--any_key value ...]

Run as a script, Python puts this file's folder, not the repository, on the import path; the first lines mend
that, so that an uninstalled checkout works from any folder. Heavy libraries are imported in `main`, where
Ctrl-C is already handled.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from rag_retrieval.core.command import Command, run_command
from rag_retrieval.train.script import leave, run_training

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
    from rag_retrieval.train.reranker.run import run

    return run_training(run, config)


if __name__ == "__main__":
    leave(main())
