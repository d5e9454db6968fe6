"""Mistakes found before training: every process raises the same one, whoever found it.

What a reader would get wrong: a process that raises alone leaves the others waiting for it. What one does for all
goes through `on_main_process`, what each does for itself through `on_all_processes`; only what is in neither ends
in `OwnMistake`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


class StartError(ValueError):
    """A mistake found before training, raised by all processes alike."""


class OwnMistake(StartError):
    """The same, found by this process; the others may know nothing of it."""


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Raise ValueError and OSError as OwnMistake: before training they are the user's, afterwards ours."""
    try:
        yield
    except StartError:
        raise
    except (ValueError, OSError) as error:
        raise OwnMistake(str(error)) from error


def on_main_process(accelerator: Accelerator, function, *arguments):
    """What `function` returns on the main process, on every process; so is a user's mistake raised."""
    result = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = function(*arguments)
        except (ValueError, OSError) as error:
            result[1] = str(error)
    broadcast_object_list(result)
    if result[1] is not None:
        raise StartError(result[1])
    return result[0]


def on_all_processes(function, *arguments):
    """What `function` returns on each process; a user's mistake found by any of them is raised by all."""
    result = problem = None
    try:
        result = function(*arguments)
    except (ValueError, OSError) as error:
        problem = error
    problems = [text for text in gather_object([problem and str(problem)]) if text is not None]
    if problems:
        raise StartError(problems[0]) from problem
    return result
