"""The folder that an evaluation writes to, held against a second one.

What a reader would get wrong: an evaluation may write over its own earlier results, and goes on from its own
unfinished scores. Those of another model or other data in the same folder are somebody's results, and stay.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rag_retrieval.core.distributed import on_main
from rag_retrieval.core.files import locked

RESULT_FILE = "result.json"
WHOSE = ("model", "data", "split")  # keys of the configuration that say whose results these are


@contextmanager
def held(folder: Path, config: dict) -> Iterator[None]:
    """The folder, made where it is missing, for the time of the block. Every process of a launch calls it.

    config: of the evaluation, as JSON values. Raises ValueError for a place where no folder can be, for one in which
    another evaluation runs, and for one that has the results of another model or other data.
    """
    with ExitStack() as lock:  # which the main process alone takes
        on_main(lambda: _take(folder, config, lock))
        yield


def _take(folder: Path, config: dict, lock: ExitStack) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir: {existing} is a file; give a folder")
    busy = f"output_dir: another evaluation writes to {folder}; wait for it, or give another output_dir"
    lock.enter_context(locked(folder / "lock", busy))
    before = _config_of_results(folder)
    # from Python a path may be relative, where the command's was absolute
    other = [key for key in WHOSE if key in before and Path(before[key]).resolve() != Path(config[key]).resolve()]
    if other:
        found = ", ".join(f"{key} {before[key]}" for key in other)
        raise ValueError(f"output_dir: {folder} has the results of {found}; give another output_dir, or remove it")


def _config_of_results(folder: Path) -> dict:
    """What the results in the folder were made with; nothing where there are none that can be read."""
    try:
        return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
