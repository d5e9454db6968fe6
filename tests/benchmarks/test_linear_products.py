import sys
from pathlib import Path

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import linear_products
import speed_floor
import torch


def test_both_ways_are_timed_for_every_layer(capsys):
    linear_products.main(["--rounds", "1", "--rows", "32"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 32 ")]
    assert [row[1] for row in rows] == ["384 x 384", "384 x 1536", "1536 x 384", "1024 x 4096"]
    assert all(len(row) == 6 for row in rows)


def test_the_floor_multiplies_in_both_ways():
    left, right = torch.randn(40, 8), torch.randn(8, 24)
    torch.testing.assert_close(speed_floor.by_onednn(left, right), left @ right)
