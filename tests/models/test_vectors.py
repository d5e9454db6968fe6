"""Vectors in fewer bits: by hand, and beside `quantize_embeddings` of sentence-transformers."""

import json

import numpy as np
import pytest

from rag_retrieval.models.vectors import Int8Ranges, finish, ranges_of, similarity, to_float32, to_precision


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)


@pytest.fixture
def ranges():
    """Steps of 1, 2 and 1 (a number that never changes)."""
    return Int8Ranges(np.float32([0, -255, 3]), np.float32([255, 255, 3]), True, 2)


def test_a_vector_is_cut_before_it_gets_length_one():
    vectors = np.array([[3, 4, 12], [0, 0, 5], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(finish(vectors, 2), [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(finish(vectors)[0], np.array([3, 4, 12]) / 13, rtol=1e-6)
    np.testing.assert_array_equal(finish(vectors, 2, normalize=False), vectors[:, :2])
    assert finish(vectors.astype(np.float64), 2).dtype == np.float32


def test_int8_takes_the_level_below_and_saturates(ranges):
    vectors = np.float32([[0.9, -254.1, 3], [1, -253, 3], [-7, 900, 3.5], [255, 255, 4.2], [254.9, 253.1, 2]])
    expected = [[-128, -128, -128], [-127, -127, -128], [-128, 127, -128], [127, 127, -127], [126, 126, -128]]
    found = to_precision(vectors, "int8", ranges)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(to_float32(found, ranges)[1], [1.5, -252, 3.5])


def test_binary_packs_whether_a_number_is_above_zero():
    found = to_precision(np.float32([[1, 0, -1, 2, 0.1, -3, 4, 5, -1, -1, -1, -1, -1, -1, -1, 1]]), "binary")
    np.testing.assert_array_equal(found, [[0b10011011, 1]])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(to_float32(found)[0], [1, -1, -1, 1, 1, -1, 1, 1, *[-1] * 7, 1])
    with pytest.raises(ValueError, match="20 is no multiple of 8"):
        to_precision(np.zeros((1, 20), np.float32), "binary")


def test_fewer_bits_are_those_of_sentence_transformers(vectors):
    from sentence_transformers.util import quantize_embeddings

    found = ranges_of(vectors, normalized=False)
    for precision, name in (("int8", "int8"), ("binary", "ubinary")):
        theirs = quantize_embeddings(2 * vectors, name, ranges=np.array([found.minimum, found.maximum]))
        np.testing.assert_array_equal(to_precision(2 * vectors, precision, found), theirs)


@pytest.mark.parametrize("precision,tolerance", [("float32", 0), ("float16", 2e-3), ("int8", 0.02)])
def test_a_stored_vector_stands_for_about_what_was_stored(vectors, precision, tolerance):
    ranges = ranges_of(vectors, normalized=False)
    stored = to_precision(vectors, precision, ranges)
    assert stored.dtype == np.dtype(precision)
    np.testing.assert_allclose(to_float32(stored, ranges), vectors, atol=tolerance)


def test_similarity_is_the_cosine_or_the_inner_product():
    queries, documents = np.float32([[1, 0], [1, 1]]), np.float32([[0, 2], [3, 4], [0, 0]])
    np.testing.assert_allclose(similarity(queries, documents, "dot"), [[0, 3, 0], [2, 7, 0]])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(similarity(queries, documents), [[0, 0.6, 0], [half, 1.4 * half, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_every_similarity_is_that_of_sentence_transformers(vectors, kind):
    from sentence_transformers.util import SimilarityFunction

    expected = SimilarityFunction.to_similarity_fn(kind)(vectors[:3], vectors[3:])
    found = similarity(vectors[:3], vectors[3:], kind)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="'angle' is not known; expected cosine"):
        similarity(vectors, vectors, "angle")


def test_similarity_compares_vectors_of_different_precisions(vectors):
    ranges = ranges_of(vectors, normalized=False)
    exact = similarity(vectors[:3], vectors)
    for precision, tolerance in (("float16", 1e-3), ("int8", 0.01)):
        found = similarity(vectors[:3], to_precision(vectors, precision, ranges), ranges=ranges)
        np.testing.assert_allclose(found, exact, atol=tolerance)
    signs = np.where(vectors > 0, 1, -1)
    expected = finish(vectors[:3]) @ finish(signs).T
    np.testing.assert_allclose(similarity(vectors[:3], to_precision(vectors, "binary")), expected, atol=1e-6)


def test_what_cannot_be_compared_is_refused(vectors, ranges):
    with pytest.raises(ValueError, match="queries have 8 numbers and documents 16"):
        similarity(vectors[:, :8], vectors)
    with pytest.raises(ValueError, match=r"queries: expected an array \[texts, numbers\], found one of shape \(16,\)"):
        similarity(vectors[0], vectors)
    with pytest.raises(ValueError, match="without their ranges"):
        similarity(vectors, np.zeros((2, 16), np.int8))
    for use in (to_precision, lambda vectors, _, ranges: to_float32(vectors.astype(np.int8), ranges)):
        with pytest.raises(ValueError, match="have 16 numbers, and the int8 ranges were calibrated for 3"):
            use(vectors, "int8", ranges)


def test_numbers_too_large_for_float16_are_refused():
    assert to_precision(np.array([[65504, -65504]], np.float32), "float16").tolist() == [[65504, -65504]]
    with pytest.raises(ValueError, match="too large for float16"):
        to_precision(np.array([[1, -65536]], np.float32), "float16")


def test_ranges_are_saved_and_read(vectors, tmp_path):
    ranges = ranges_of(vectors, normalized=True)
    np.testing.assert_array_equal(ranges.minimum, [column.min() for column in vectors.T])
    np.testing.assert_array_equal(ranges.maximum, [column.max() for column in vectors.T])
    ranges.save(tmp_path / "ranges.json")
    found = Int8Ranges.read(tmp_path / "ranges.json")
    assert (found.normalized, found.vectors) == (True, 40)
    np.testing.assert_array_equal([found.minimum, found.maximum], [ranges.minimum, ranges.maximum])


def test_ranges_that_cannot_be_are_refused(vectors, tmp_path):
    with pytest.raises(ValueError, match="at least 2 vectors, better 1,000; found 1"):
        ranges_of(vectors[:1], normalized=True)
    vectors[3, 3] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        ranges_of(vectors, normalized=True)
    good = {"minimum": [0, 0], "maximum": [1, 1], "normalized": True, "vectors": 5}
    for damage in ({"maximum": [1]}, {"maximum": [1, -1]}, {"minimum": "no"}, {"minimum": None}):
        (tmp_path / "ranges.json").write_text(json.dumps(good | damage))
        with pytest.raises(ValueError, match=r"ranges.json: .*calibrate again"):
            Int8Ranges.read(tmp_path / "ranges.json")
