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

BUFFERED = 1 << 12  # rows of the fullest column of texts


class ColumnWriter:
    """Appends to column files. A context manager, at whose end all is written.

    numbers: a growing `array` for each column of numbers, to append to. Its dtype is a character of `array`.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, str], texts: Iterable[str]):
        self.numbers = {name: array(dtype) for name, dtype in dtypes.items()}
        self._ends = {name: array("q", [0]) for name in texts}
        self._buffers = self.numbers | {f"{name}.offsets": ends for name, ends in self._ends.items()}
        self._stack = ExitStack()
        files = {name: self._stack.enter_context((folder / name).open("wb")) for name in [*self._buffers, *self._ends]}
        self._write = {name: file.write for name, file in files.items()}
        self._sizes = dict.fromkeys(self._ends, 0)

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(self, *error) -> None:
        self._flush()
        self._stack.close()

    def add_text(self, name: str, text: bytes) -> None:
        """text: as UTF-8."""
        self._write[name](text)
        size = self._sizes[name] = self._sizes[name] + len(text)
        ends = self._ends[name]
        ends.append(size)
        if len(ends) >= BUFFERED:
            self._flush()

    def _flush(self) -> None:
        for name, values in self._buffers.items():
            self._write[name](values.tobytes())
            del values[:]


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
