"""Columns in files: numbers and texts of many rows, written one after another and read in place.

A column of numbers is a flat file of its dtype. A column of texts is two of them: `NAME` has the texts as UTF-8, end to
end, and `NAME.offsets` where each begins, and where the last one ends. Processes share what they map, and the memory
of a process does not grow with the file.
"""

from array import array
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np


class ColumnWriter:
    """Appends to column files. numbers: name to dtype character of `array` ("q", "f", ...). A context manager."""

    def __init__(self, folder: Path, numbers: Mapping[str, str], texts: Iterable[str]):
        self._dtypes = numbers
        self._ends = dict.fromkeys(texts, 0)
        names = [*numbers, *self._ends, *(f"{name}.offsets" for name in self._ends)]
        self._stack = ExitStack()
        files = [self._stack.enter_context((folder / name).open("wb")) for name in names]  # noqa: SIM115, see __exit__
        self._write = {name: file.write for name, file in zip(names, files, strict=True)}
        for name in self._ends:
            self._write[f"{name}.offsets"](bytes(8))

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def add_numbers(self, name: str, values: Iterable[float]) -> None:
        self._write[name](array(self._dtypes[name], values).tobytes())

    def add_texts(self, name: str, texts: Iterable[bytes]) -> None:
        """texts: as UTF-8."""
        ends = array("q")
        end = self._ends[name]
        for text in texts:
            end += len(text)
            ends.append(end)
            self._write[name](text)
        self._ends[name] = end
        self._write[f"{name}.offsets"](ends.tobytes())


def read_column(path: Path, dtype: str, mode: str = "r") -> np.ndarray:
    """The mapped numbers of a file; read-only unless `mode` is "r+"."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode))  # a plain array: slicing a memmap is slow


class Texts:
    """A mapped column of texts, decoded one by one; memoryviews cost a third of numpy's access to an element."""

    def __init__(self, folder: Path, name: str):
        self._offsets = memoryview(read_column(folder / f"{name}.offsets", "i8"))
        self._text = memoryview(read_column(folder / name, "u1"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        return str(self._text[self._offsets[row] : self._offsets[row + 1]], "utf-8")
