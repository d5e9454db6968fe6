"""Pre-train an encoder on plain texts from a YAML file.

    accelerate launch train_pretrain.py --config pretraining_retromae.yaml [--any_key value ...]

Run as a script, Python puts this file's folder, not the repository, on the import path; the first lines mend
that, so that an uninstalled checkout works from any folder. Heavy libraries are imported when the run begins, where
Ctrl-C is already handled.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from rag_retrieval.train.script import leave, main_of


def main(arguments: list[str] | None = None) -> int:
    """The exit code: see `script.main_of`."""
    return main_of("pretrain", arguments)


if __name__ == "__main__":
    leave(main())
