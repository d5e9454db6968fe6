"""Long work in shards, done by this process, by all processes of a launch, or by a Ray cluster: `run_shards`.

What a shard is, and what a killed job leaves, is said in `core.shard_folder`.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from rag_retrieval.core.config import LOCAL, EngineOptions
from rag_retrieval.core.distributed import on_all, on_main, process_index
from rag_retrieval.core.log import Progress
from rag_retrieval.core.ray_engine import make_with_ray
from rag_retrieval.core.shard_folder import ShardFolder, ShardWork, make_locally

logger = logging.getLogger(__name__)


def run_shards(
    folder: Path,
    made_from: dict[str, Any],
    sizes: Sequence[int],
    work: ShardWork,
    engine: EngineOptions = LOCAL,
    *,
    description: str = "working",
    unit: str = "texts",
    overwrite: bool = False,
) -> list[Path]:
    """Make the shards that `folder` does not have yet. Returns the folders of all, in their order.

    Under `accelerate launch` every process of the group calls it, and whoever is free takes the next shard; all return
    when all shards are there. made_from: all that the shards depend on, by name, as JSON values. sizes: how many of
    `unit` each shard has, for the progress that is shown as `description`. overwrite: whether shards made from
    something else are removed.

    Raises ValueError where another job works in the folder, for shards made from something else, with each name that
    differs, and for a folder that holds other things; ShardError for a shard that nobody could make; and what `open`
    and make raise. Shards that are finished by then stay.
    """
    shards = ShardFolder(folder)
    with ExitStack() as lock:  # which the main process alone takes
        on_main(lambda: shards.begin(made_from, len(sizes), overwrite, lock))
        done = on_main(lambda: [number for number in range(len(sizes)) if shards.is_finished(number)])
        missing = sorted(set(range(len(sizes))).difference(done))
        total, before, shown = sum(sizes), sum(sizes[number] for number in done), Counter()
        if done:
            logger.info("%s: %s of %s %s were done before", folder, f"{before:,}", f"{total:,}", unit)
        with Progress(total, description, unit, before, shown=process_index() == 0) as progress:

            def report(number: int, count: int | None = None) -> None:
                count = sizes[number] - shown[number] if count is None else count
                shown[number] += count
                progress.update(count)

            if engine.engine == "ray" and missing:
                on_main(lambda: make_with_ray(shards, missing, work, engine, report))
            else:
                on_all(lambda: make_locally(shards, missing, cache(work.open_here), report))
        on_main(shards.remove_temporaries)
    return [shards.path(number) for number in range(len(sizes))]
