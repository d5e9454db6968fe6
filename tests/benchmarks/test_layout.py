"""The layout benchmark prints the figures of every part."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import layout


def test_every_part_of_the_layout_is_timed(capsys):
    layout.main(["--tokens", "2000"])
    printed = capsys.readouterr().out
    assert printed.count("median") == 5 and "decoder, shared queries" in printed
