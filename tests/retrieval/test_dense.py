"""Vectors in shards, and the nearest of them by every search, against a plain loop over all."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rag_retrieval.models.vectors import ranges_of, to_float32, to_precision
from rag_retrieval.retrieval.approximate import build_faiss, read_faiss, search_faiss
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.dense import DenseSearch
from rag_retrieval.retrieval.stored_vectors import NumberCodec, Vectors, append_vectors, drawn_rows

VECTORS = np.random.default_rng(0).integers(-3, 4, (60, 8)).astype(np.float32)  # many equal scores
RANGES = ranges_of(VECTORS, normalized=False)
QUERIES = np.random.default_rng(1).normal(size=(5, 8)).round().astype(np.float32)
JUDGED = [np.array(rows, np.int64) for rows in ([3], [], [0, 59], [20], [19, 20])]


def stored(tmp_path, precision, name="vectors", sizes=(20, 20, 19, 1)):
    shards, start = [], 0
    for number, size in enumerate(sizes):
        shards.append(tmp_path / f"shard-{number:06d}")
        shards[-1].mkdir(exist_ok=True)
        part = to_precision(VECTORS[start : start + size], precision, RANGES)
        for half in (part[: size // 2], part[size // 2 :]):
            append_vectors(shards[-1] / f"{name}.npy", half)
        start += size
    return Vectors(shards, name, NumberCodec(precision, RANGES))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_the_exact_search_over_shards_is_that_over_all_decoded_vectors(tmp_path, precision):
    vectors = stored(tmp_path, precision)
    assert isinstance(vectors.parts[0], np.memmap)
    decoded = to_float32(to_precision(VECTORS, precision, RANGES), RANGES)
    np.testing.assert_array_equal(np.concatenate(list(vectors.blocks(7))), decoded)
    found = DenseSearch(vectors, None, "cpu").search_vectors(QUERIES, JUDGED, 9)
    for candidates, query, judged in zip(found, QUERIES, JUDGED, strict=True):
        scores = decoded @ query
        expected = sorted(range(60), key=lambda row: (-round(float(scores[row]), 4), row))[:9]
        np.testing.assert_allclose(candidates.scores, scores[expected], rtol=1e-5)
        np.testing.assert_allclose(candidates.judged_scores, scores[judged], rtol=1e-5)
        if precision != "int8":  # whose equal scores differ in the last bit
            assert candidates.rows.tolist() == expected


def test_a_finer_copy_scores_the_best_anew(tmp_path):
    coarse, finer = stored(tmp_path, "binary"), stored(tmp_path, "float32", "finer")
    found = DenseSearch(coarse, None, "cpu", finer, factor=3).search_vectors(QUERIES, JUDGED, 4)
    bits = to_float32(to_precision(VECTORS, "binary"))
    for candidates, query, judged in zip(found, QUERIES, JUDGED, strict=True):
        first, scores = bits @ query, VECTORS @ query
        twelve = sorted(range(60), key=lambda row: (-first[row], row))[:12]
        assert candidates.rows.tolist() == sorted(twelve, key=lambda row: (-scores[row], row))[:4]
        assert candidates.scores.tolist() == scores[candidates.rows].tolist()
        assert candidates.judged_scores.tolist() == scores[judged].tolist()


def test_recall_is_the_part_of_the_nearest_that_is_found(tmp_path):
    finer = stored(tmp_path, "float32", "finer")
    assert DenseSearch(stored(tmp_path, "float16", "half"), None, "cpu", finer).recall(0) == 1
    search = DenseSearch(stored(tmp_path, "binary"), None, "cpu", finer, factor=1)
    found = search.search_vectors(VECTORS, [np.zeros(0, np.int64)] * 60, 11)
    parts = []
    for row, candidates in enumerate(found):
        scores = VECTORS @ VECTORS[row]
        nearest = sorted(range(60), key=lambda other: (-scores[other], other))[:11]
        nearest = [other for other in nearest if other != row]
        parts.append(np.mean([other in candidates.rows for other in nearest]))
    assert search.recall(0) == pytest.approx(np.mean(parts)) and np.mean(parts) < 0.9


def test_a_single_document_misses_nothing(tmp_path):
    append_vectors(tmp_path / "vectors.npy", VECTORS[:1])
    vectors = Vectors([tmp_path], "vectors", NumberCodec("float32"))
    assert DenseSearch(vectors, None, "cpu", finer=vectors).recall(0) == 1


def test_shards_are_read_by_any_rows_in_any_order(tmp_path):
    rows = np.array([59, 0, 20, 19, 20, 40])
    assert stored(tmp_path, "float32").rows(rows).tolist() == VECTORS[rows].tolist()


# ---- FAISS


def options(factory):
    return IndexOptions(embedder="model", faiss_index=factory)


def test_without_faiss_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="faiss_index needs FAISS; run: pip install faiss-cpu"):
        build_faiss(stored(tmp_path, "float16"), options("Flat"), tmp_path)


@pytest.mark.parametrize(
    "factory, search, on_disk",
    [("Flat", None, False), ("IVF4,Flat", "nprobe=4", True), ("PCA8,IVF4,SQ8", "nprobe=4", True),
     ("HNSW8", None, False)],
)  # fmt: skip
def test_faiss_finds_what_the_exact_search_finds(tmp_path, factory, search, on_disk, capfd):
    pytest.importorskip("faiss")
    vectors = stored(tmp_path, "float16")
    (tmp_path / "built").mkdir()
    build_faiss(vectors, options(factory), tmp_path / "built")
    moved = (tmp_path / "built").rename(tmp_path / "moved")
    assert {file.name for file in moved.iterdir()} == ({"index", "lists"} if on_disk else {"index"})
    by_faiss = DenseSearch(vectors, None, "cpu", index=read_faiss(moved, search), factor=3)
    exact = DenseSearch(vectors, None, "cpu")
    for found, expected in zip(
        by_faiss.search_vectors(QUERIES, JUDGED, 7), exact.search_vectors(QUERIES, JUDGED, 7), strict=True
    ):
        assert found.rows.tolist() == expected.rows.tolist()
        assert found.scores.tolist() == expected.scores.tolist()
        assert found.judged_scores.tolist() == expected.judged_scores.tolist()
    assert capfd.readouterr().out == ""


def test_threads_find_by_faiss_what_one_finds(tmp_path):
    pytest.importorskip("faiss")
    vectors = stored(tmp_path, "float16")
    build_faiss(vectors, options("IVF4,Flat"), tmp_path)
    search = DenseSearch(vectors, None, "cpu", index=read_faiss(tmp_path, None), factor=2)

    def found(place: int) -> tuple[list[int], list[float]]:
        (one,) = search.search_vectors(QUERIES[[place % 5]], [JUDGED[0]], 7)
        return one.rows.tolist(), one.scores.tolist()

    expected = [found(place) for place in range(5)]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(found, range(1000))) == expected * 200


def test_an_ivf_index_looks_through_one_list_in_16_unless_told_otherwise(tmp_path):
    pytest.importorskip("faiss")
    build_faiss(stored(tmp_path, "float16"), options("IVF48,Flat"), tmp_path)
    assert [read_faiss(tmp_path, search).nprobe for search in (None, "nprobe=7")] == [3, 7]


@pytest.mark.parametrize("factory", ["IVF4,PQ4x4fs", "IVF4,Flat,RFlat"])
def test_an_ivf_index_that_cannot_lie_on_the_disk_is_held_in_memory(tmp_path, factory):
    pytest.importorskip("faiss")
    vectors = stored(tmp_path, "float16")
    build_faiss(vectors, options(factory), tmp_path)
    found = DenseSearch(vectors, None, "cpu", index=read_faiss(tmp_path, "nprobe=4"), factor=8)
    assert found.recall(0) == 1 and not (tmp_path / "lists").exists()


def test_an_index_or_a_parameter_that_faiss_does_not_know_is_refused(tmp_path):
    pytest.importorskip("faiss")
    vectors = stored(tmp_path, "float16")
    with pytest.raises(ValueError, match="faiss_index 'Flut': FAISS cannot make this index"):
        build_faiss(vectors, options("Flut"), tmp_path)
    build_faiss(vectors, options("Flat"), tmp_path)
    with pytest.raises(ValueError, match="faiss_search 'probes=4': this index takes no such parameter"):
        read_faiss(tmp_path, "probes=4")


def test_what_faiss_did_not_fill_is_left_out(tmp_path):
    class Short:
        def search(self, encoded, depth):
            return np.array([[0.5, 0.25, -1]], np.float32), np.array([[7, 2, -1]])

    found = DenseSearch(stored(tmp_path, "float32"), None, "cpu", index=Short())
    (found,) = found.search_vectors(QUERIES[:1], JUDGED[:1], 3)
    assert sorted(found.rows.tolist()) == [2, 7]


def test_rows_are_drawn_once_each_from_any_number_of_them():
    rows = drawn_rows(10**12, 100, seed=3)  # of which a permutation would take 8 TB
    assert len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all()
    assert rows.tolist() == drawn_rows(10**12, 100, seed=3).tolist() != drawn_rows(10**12, 100, seed=4).tolist()
    assert drawn_rows(5, 100, seed=3).tolist() == [0, 1, 2, 3, 4]


# ---- among a part of the documents

PART = np.arange(1, 60, 3)


@pytest.mark.parametrize("precision", ["float32", "binary"])
def test_a_search_among_a_part_is_that_over_its_vectors_alone(tmp_path, precision, monkeypatch):
    monkeypatch.setattr("rag_retrieval.models.nearest.SEARCHED", 4)
    vectors = stored(tmp_path, precision)
    decoded = to_float32(to_precision(VECTORS, precision, RANGES), RANGES)
    for part in (PART, np.array([], np.int64), np.array([59]), np.arange(60)):
        found = DenseSearch(vectors, None, "cpu").search_vectors(QUERIES, JUDGED, 9, part)
        for candidates, query, judged in zip(found, QUERIES, JUDGED, strict=True):
            scores = decoded @ query
            assert candidates.rows.tolist() == sorted(part.tolist(), key=lambda row: (-scores[row], row))[:9]
            assert candidates.scores.tolist() == scores[candidates.rows].tolist()
            assert candidates.judged_scores.tolist() == scores[judged].tolist()


def test_coarse_vectors_are_searched_among_a_part_and_few_of_them_by_the_finer_ones(tmp_path, monkeypatch):
    coarse, finer = stored(tmp_path, "binary"), stored(tmp_path, "float32", "finer")
    search, bits = DenseSearch(coarse, None, "cpu", finer, factor=2), to_float32(to_precision(VECTORS, "binary"))
    for few in (100, 0):
        monkeypatch.setattr("rag_retrieval.retrieval.dense.FEW", few)
        for candidates, query in zip(search.search_vectors(QUERIES, JUDGED, 4, PART), QUERIES, strict=True):
            first, scores = bits @ query, VECTORS @ query
            kept = PART.tolist() if few else sorted(PART.tolist(), key=lambda row: (-first[row], row))[:8]
            assert candidates.rows.tolist() == sorted(kept, key=lambda row: (-scores[row], row))[:4]


@pytest.mark.parametrize(
    "factory, search, has_selector",
    [("Flat", None, True), ("IVF4,Flat", "nprobe=4", True), ("IVF4,PQ4x4", "nprobe=4", True),
     ("PCA8,IVF4,SQ8", "nprobe=4", True), ("IVF4,Flat,RFlat", "nprobe=4", True), ("HNSW8", "efSearch=64", True),
     ("IVF4,PQ4x4fs", "nprobe=4", True), ("PQ4x4", None, False)],
)  # fmt: skip
def test_faiss_searches_among_a_part_or_all_of_it_are_compared(tmp_path, factory, search, has_selector, monkeypatch):
    """The rescoring reaches all of the part, so that what is found is exact."""
    pytest.importorskip("faiss")
    monkeypatch.setattr("rag_retrieval.retrieval.dense.FEW", 0)
    vectors = stored(tmp_path, "float32")
    build_faiss(vectors, options(factory), tmp_path)
    index = read_faiss(tmp_path, search)
    by_faiss = search_faiss(index, QUERIES, 5, PART)
    assert (np.isin(by_faiss, PART) == has_selector).all() and (has_selector or (by_faiss == -1).all())
    found = DenseSearch(vectors, None, "cpu", index=index, factor=3).search_vectors(QUERIES, JUDGED, 6, PART)
    for candidates, query in zip(found, QUERIES, strict=True):
        scores = VECTORS @ query
        expected = sorted(PART.tolist(), key=lambda row: (-scores[row], row))[:6]
        np.testing.assert_allclose(candidates.scores, scores[expected], rtol=1e-5)
        assert set(candidates.rows.tolist()) <= set(PART.tolist())


def test_what_faiss_misses_of_a_part_is_compared(tmp_path, monkeypatch):
    """It looks through one list of eight, in which no query finds nine of the part."""
    pytest.importorskip("faiss")
    monkeypatch.setattr("rag_retrieval.retrieval.dense.FEW", 0)
    vectors = stored(tmp_path, "float32")
    build_faiss(vectors, options("IVF8,Flat"), tmp_path)
    index = read_faiss(tmp_path, "nprobe=1")
    assert (search_faiss(index, QUERIES, 9, PART) == -1).any(axis=1).all()
    found = DenseSearch(vectors, None, "cpu", index=index, factor=1).search_vectors(QUERIES, JUDGED, 9, PART)
    exact = DenseSearch(vectors, None, "cpu").search_vectors(QUERIES, JUDGED, 9, PART)
    assert [one.rows.tolist() for one in found] == [one.rows.tolist() for one in exact]


def test_an_index_that_does_not_look_at_the_selector_finds_nothing_outside(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr("rag_retrieval.retrieval.approximate.search_parameters", lambda *_: None)
    build_faiss(stored(tmp_path, "float32"), options("Flat"), tmp_path)
    rows = search_faiss(read_faiss(tmp_path, None), QUERIES, 30, PART)
    assert (rows >= 0).any() and np.isin(rows[rows >= 0], PART).all()


def test_a_search_among_a_part_keeps_the_parameters_of_the_index(tmp_path, monkeypatch):
    """With FAISS's own defaults it would look through one list."""
    pytest.importorskip("faiss")
    build_faiss(stored(tmp_path, "float32"), options("IVF8,Flat"), tmp_path)
    rows = [search_faiss(read_faiss(tmp_path, f"nprobe={probes}"), QUERIES, 20, PART) for probes in (1, 8)]
    assert (rows[1] >= 0).all() and not (rows[0] >= 0).all()
