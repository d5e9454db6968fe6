"""Progress bars with the time left: on a terminal alone, since in a log file each redraw would be a line."""

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, unit: str, done: int = 0) -> tqdm:
    """`done`: of `total`, what an earlier run has finished; the time left is computed from the rest."""
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        disable=None,  # tqdm's own way to say: unless the output is a terminal
    )
