import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

faiss = pytest.importorskip("faiss")
import index_scale  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(index_scale, "SHARD", 300)


@pytest.mark.parametrize("search", ["exact", "IVF4,PQ48x4"])
def test_a_search_is_measured(tmp_path, search):
    row = index_scale.measure(tmp_path, 1000, search).split()
    assert row[:2] == ["1,000", search] and len(row) == len(index_scale.COLUMNS)
    built, stored, one, many, recall, private = map(float, row[2:])
    assert built >= 0 and one > 0 and many > 0 and private > 10 and 0.5 < recall <= 1


def test_vectors_lie_around_centres_and_shards_differ(tmp_path):
    index_scale.make_vectors(tmp_path / "vectors", 1000)
    parts = [np.load(file).astype(np.float32) for file in sorted(tmp_path.glob("vectors/shard-*/vectors.npy"))]
    assert [part.shape for part in parts] == [(300, 384), (300, 384), (300, 384), (100, 384)]
    similar = np.concatenate(parts) @ parts[0][:1].T
    near = similar[similar > 0.4]  # of one of five centres
    assert 100 < len(near) < 300 and abs(np.median(near) - 0.64) < 0.03
    np.testing.assert_allclose(np.linalg.norm(parts[1], axis=1), 1, atol=1e-3)
