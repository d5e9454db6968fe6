"""Residual codes of token vectors, bit for bit and against loops, and what a search loses by them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rag_retrieval.models.vectors import finish
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.stored_vectors import NumberCodec
from rag_retrieval.retrieval.token_codec import (
    ResidualCodec,
    fit,
    fit_centroids,
    fit_residuals,
    loss_of,
    nearest_centroids,
    pack,
    read_centroids,
    read_codec,
    read_loss,
)
from rag_retrieval.retrieval.token_vectors import TokenVectors

CPU = torch.device("cpu")


def clustered(texts=30, tokens=20, width=16, seed=0):
    """Texts of token vectors around 12 centres, each text with three of them."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(12, width))
    chosen = [generator.choice(generator.choice(12, 3), tokens) for _ in range(texts)]
    return TokenVectors.of([finish(centres[of] + 0.4 * generator.normal(size=(tokens, width))) for of in chosen])


def test_bits_stand_in_a_byte_from_the_lowest_on():
    assert pack(np.array([[1, 0, 1, 1, 0, 0, 0, 0, 1]], np.uint8), 1).tolist() == [[0b1101, 1]]
    assert pack(np.array([[1, 2, 3, 0, 2]], np.uint8), 2).tolist() == [[0b00111001, 2]]
    assert pack(np.array([[15, 3, 9]], np.uint8), 4).tolist() == [[0x3F, 9]]


def test_a_row_is_the_nearest_centroid_and_the_bucket_of_each_number():
    centroids = finish(np.array([[1, 0, 0], [0, 1, 0]]))
    cutoffs, values = np.array([-0.1, 0, 0.1], np.float32), np.array([-0.2, -0.05, 0.05, 0.2], np.float32)
    codec = ResidualCodec(centroids, cutoffs, values)
    vectors = finish(np.array([[0.9, 0.15, -0.3], [0.1, 1.0, 0.02]]))
    stored = codec.encode(vectors)
    # residuals of the first: -.06 .16 -.31, so buckets 1 3 0
    residuals = vectors - centroids
    buckets = [[sum(value > cutoff for cutoff in codec.cutoffs) for value in row] for row in residuals]
    assert buckets[0] == [1, 3, 0]
    expected = [[code, 0, 0, 0, sum(bucket << 2 * place for place, bucket in enumerate(of_row))]
                for code, of_row in enumerate(buckets)]  # fmt: skip
    assert stored.dtype == np.uint8 and stored.tolist() == expected
    values = np.array([[codec.values[bucket] for bucket in row] for row in buckets])
    np.testing.assert_allclose(codec.decode(stored), finish(centroids + values), rtol=1e-6)
    assert codec.codes(stored).tolist() == [0, 1]
    assert codec.encode(vectors[:0]).shape == (0, 5) and codec.decode(stored[:0]).shape == (0, 3)


@pytest.mark.parametrize("bits, bytes_, least", [(4, 4 + 8, 0.99), (2, 4 + 4, 0.95), (1, 4 + 2, 0.9)])
def test_more_bits_are_nearer_to_the_vectors(bits, bytes_, least):
    vectors = clustered().vectors
    centroids = fit_centroids(vectors, 12, seed=0)
    codec = fit_residuals(vectors, centroids, bits, CPU)
    stored = codec.encode(vectors)
    assert stored.shape == (600, bytes_)
    cosines = (codec.decode(stored) * vectors).sum(axis=1)
    alone = (centroids[nearest_centroids(vectors, centroids, CPU)] * vectors).sum(axis=1)
    assert cosines.mean() > max(least, alone.mean())


def test_centroids_are_means_of_what_is_nearest_to_them():
    vectors = clustered().vectors
    centroids = fit_centroids(vectors, 12, seed=3)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(centroids, fit_centroids(vectors, 12, seed=3))
    first = vectors[np.random.default_rng(3).choice(600, 12, replace=False)]
    for _ in range(4):
        codes = (vectors @ first.T).argmax(axis=1)
        first = np.array([finish(vectors[codes == place].sum(axis=0)[None])[0] for place in range(12)])
    np.testing.assert_allclose(centroids, first, atol=1e-5)
    assert len(fit_centroids(vectors, 1000, seed=3)) == 600 // 16 and len(fit_centroids(vectors[:3], 8, seed=3)) == 1


def options(precision, candidates="dense"):
    residual = precision.startswith("residual")
    return SimpleNamespace(
        token_precision=precision, seed=1, has_centroids=residual or candidates == "tokens"
    )  # of IndexOptions, what a fit reads


@pytest.mark.parametrize("precision", ["residual2", "int8"])
def test_what_was_fitted_is_read_again(tmp_path, precision):
    sample = clustered()
    fit(sample, 3000, options(precision), CPU, tmp_path)
    codec = read_codec(tmp_path, precision, CPU)
    stored = codec.encode(sample.vectors)
    cosines = (finish(codec.decode(stored)) * sample.vectors).sum(axis=1)
    assert cosines.mean() > 0.97 and stored.shape[1] == {"residual2": 4 + 4, "int8": 16}[precision]
    assert read_loss(tmp_path) == loss_of(codec, sample, CPU)
    if precision == "residual2":
        # 60,000 tokens are expected: 16 x 244.9 = 3,919, so 2,048 centroids, of which 600 / 16 have vectors enough
        assert len(read_centroids(tmp_path)) == 37


@pytest.mark.parametrize("options", [{"token_precision": "residual2"}, {"token_candidates": "tokens"}])
def test_documents_without_any_token_vector_have_no_centroids(tmp_path, options):
    """As where every token of theirs is in the skiplist."""
    sample = TokenVectors(np.zeros((0, 16), np.float32), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="3 documents have no token vector"):
        fit(sample, 3, IndexOptions(embedder="m", representations=["multi_vector"], **options), CPU, tmp_path)


def test_nothing_is_lost_by_vectors_that_are_kept_whole(tmp_path):
    assert loss_of(NumberCodec("float32"), clustered(), CPU) == {"recall": 1, "ndcg": 1}
    fit(clustered(), 30, options("float16", "tokens"), CPU, tmp_path)
    assert read_loss(tmp_path) == {} and read_loss(None) == {} and len(read_centroids(tmp_path)) > 1
    assert loss_of(NumberCodec("float32"), TokenVectors.of(clustered().texts()[:1]), CPU) == {"recall": 1, "ndcg": 1}


def test_the_loss_is_that_of_a_loop_over_the_sample():
    class Signs:
        """Keeps nothing but signs."""

        def encode(self, vectors):
            return np.sign(vectors)

        def decode(self, stored):
            return finish(stored)

    sample = clustered(texts=60)
    measured = loss_of(Signs(), sample, CPU)
    texts, signs = sample.texts(), [finish(np.sign(text)) for text in sample.texts()]
    recalls, values = [], []
    for place in range(50):
        lists = []
        for documents in (texts, signs):
            others = [row for row in range(60) if row != place]
            scores = {row: (texts[place][:32] @ documents[row].T).max(axis=1).sum() for row in others}
            lists.append(sorted(scores, key=lambda row: -scores[row])[:10])
        exact, found = lists
        recalls.append(len(set(exact) & set(found)) / 10)
        discounts = 1 / np.log2(np.arange(2, 12))
        gains = [10 - exact.index(row) if row in exact else 0 for row in found]
        values.append((gains * discounts).sum() / (np.arange(10, 0, -1) * discounts).sum())
    assert measured["recall"] == pytest.approx(np.mean(recalls), abs=0.005) and np.mean(recalls) < 0.95
    assert measured["ndcg"] == pytest.approx(np.mean(values), abs=0.005)
