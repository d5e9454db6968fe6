"""Rankings by each representation and by their ensemble, against scores of one pair after another."""

import numpy as np
import pytest
import torch

from rag_retrieval.data.collection import Collection
from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.unified import unified
from rag_retrieval.train.embedding import rankings as module
from rag_retrieval.train.embedding.rankings import TextScores, rankings
from rag_retrieval.train.embedding.text_outputs import Entries, Outputs

ALL = ["dense", "lexical", "multi_vector"]
OBJECTIVE = unified(Objective(()), ALL, multi_vector_mean=True)


def outputs(texts: int, seed: int, names=ALL) -> Outputs:
    """Of small whole numbers, which are exact: a dense vector, up to 3 of 6 token ids, and up to 3 token vectors."""
    draw = np.random.default_rng(seed)

    def whole(*shape):
        return torch.from_numpy(draw.integers(-2, 3, shape)).float()

    ids = [np.sort(draw.choice(6, draw.integers(0, 4), replace=False)) for _ in range(texts)]
    tokens = torch.from_numpy(draw.integers(1, 4, texts))
    found = {
        "dense": Entries(whole(texts, 4) + 0.5, torch.ones(texts, dtype=torch.int64)),
        "lexical": Entries(
            whole(sum(map(len, ids))).abs(), torch.tensor([len(each) for each in ids]),
            torch.from_numpy(np.concatenate(ids)),
        ),
        "multi_vector": Entries(whole(int(tokens.sum()), 4), tokens),
    }  # fmt: skip
    return {name: found[name] for name in names}


def text_of(side: Outputs, place: int) -> tuple[np.ndarray, dict[int, float], np.ndarray]:
    one = {name: entries.at(torch.tensor([place])) for name, entries in side.items()}
    dense, tokens = (one[name].values.double().numpy() for name in ("dense", "multi_vector"))
    weights = dict(zip(one["lexical"].ids.tolist(), one["lexical"].values.tolist(), strict=True))
    return dense[0] / np.linalg.norm(dense[0]), weights, tokens


def slow_scores(queries: Outputs, documents: Outputs, query: int, document: int) -> dict[str, float]:
    dense, weights, tokens = text_of(queries, query)
    others, other_weights, other_tokens = text_of(documents, document)
    found = {
        "dense": float(dense @ others),
        "lexical": sum(weight * other_weights.get(token, 0.0) for token, weight in weights.items()),
        "multi_vector": float(np.mean([max(float(own @ other) for other in other_tokens) for own in tokens])),
    }
    return found | {"ensemble": found["dense"] + 0.3 * found["lexical"] + found["multi_vector"]}


@pytest.fixture
def sides():
    return outputs(5, 1), outputs(9, 2)


def collection(queries: int, documents: int, pool=None) -> Collection:
    names = [f"d{place}" for place in range(documents)]
    return Collection("", {f"q{place}": "" for place in range(queries)}, dict.fromkeys(names, ""), {}, pool=pool)


@pytest.mark.parametrize("elements", [1, 100, 1 << 22])
def test_every_representation_and_the_ensemble_rank_the_corpus(sides, monkeypatch, elements):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    runs = rankings(collection(5, 9), OBJECTIVE, *sides, depth=4)
    assert list(runs) == [*ALL, "ensemble"]
    for query in range(5):
        expected = [slow_scores(*sides, query, document) for document in range(9)]
        for name, run in runs.items():
            order = sorted(range(9), key=lambda place, name=name: (-round(expected[place][name], 5), -place))[:4]
            assert list(run[f"q{query}"]) == [f"d{place}" for place in order], "of equal ones the greater id is first"
            values = list(run[f"q{query}"].values())
            assert values == pytest.approx([expected[place][name] for place in order], abs=1e-5)


def test_a_pool_is_ranked_alone(sides):
    pool = {"q1": ["d7", "d2"], "q3": []}
    runs = rankings(collection(5, 9, pool), OBJECTIVE, *sides, depth=100)
    for name, run in runs.items():
        expected = {document: slow_scores(*sides, 1, int(document[1]))[name] for document in pool["q1"]}
        assert run["q1"] == pytest.approx(expected, abs=1e-5) and run["q0"] == run["q3"] == {}


def test_one_representation_alone_has_its_own_ranking(sides):
    for name in ALL:
        objective = unified(Objective(()), [name], multi_vector_mean=name == "multi_vector")
        own = ({name: side[name]} for side in sides)
        runs = rankings(collection(5, 9), objective, *own, depth=9)
        assert list(runs) == [name] and len(runs[name]["q0"]) == 9
        first, score = next(iter(runs[name]["q0"].items()))
        assert score == pytest.approx(slow_scores(*sides, 0, int(first[1]))[name], abs=1e-5)


def test_scores_of_pairs_are_those_of_the_whole_vector_whatever_the_widths(sides):
    objective = unified(Objective((), widths=(2,)), ALL, multi_vector_mean=True)
    pairs = TextScores(objective, *sides).of_pairs(torch.tensor([0, 4]), torch.tensor([[3, 8], [0, 0]]))
    for row, (query, documents) in enumerate(((0, (3, 8)), (4, (0, 0)))):
        for name, values in pairs.items():
            expected = [slow_scores(*sides, query, document)[name] for document in documents]
            assert values[row].tolist() == pytest.approx(expected, abs=1e-5)
