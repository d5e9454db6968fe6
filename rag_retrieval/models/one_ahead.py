"""Work on the next item while the caller uses this one: tokenization beside the forwards of the pairs before.

What a reader would get wrong: the thread is of use because tokenizers and forwards leave Python's lock; work in pure
Python would gain nothing. Nothing here imports torch.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def one_ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """work(item) of each item in order, the next one computed in a thread while the caller uses this one.

    Items are taken in the caller's thread, and one item alone starts no thread. An error of `work` is raised here,
    when its turn comes. Close the generator when leaving early: that waits for the item in work.
    """
    items = iter(items)
    for first in islice(items, 1):
        result = work(first)  # nothing to overlap with yet
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="one-ahead") as thread:
            for item in items:
                following = thread.submit(work, item)
                yield result
                result = following.result()
        yield result
