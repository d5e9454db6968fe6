"""The functions that a work enters, by file and name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import count_calls

SOURCE = """
class Thing:
    def first(self):
        return [value for value in (1, 2)]

    def second(self):
        return (lambda: self.first())()

def unused():
    pass
"""


def test_distinct_functions_are_counted_once_and_no_class_lambda_or_comprehension(tmp_path, capsys):
    file = tmp_path / "package" / "part" / "thing.py"
    names: dict = {}

    def work():
        exec(compile(SOURCE, str(file), "exec"), names)
        for _ in range(3):
            names["Thing"]().second()

    seen = count_calls.functions_of(work, tmp_path / "package")
    assert seen == {("part/thing.py", "Thing.first"), ("part/thing.py", "Thing.second")}
    count_calls.report("thing", seen, names=True)
    printed = capsys.readouterr().out
    assert "2 functions in 1 files" in printed and "Thing.first, Thing.second" in printed
