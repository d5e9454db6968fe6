"""Indexes of lexical weights and token vectors beside dense vectors: built, searched, changed, mined, measured."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from index_samples import ALL, QUERIES, corpus_file, documents, files_of, m3_folder, results
from mining_samples import animal_data, config_of, read_output
from tiny_models import tiny_bert

from rag_retrieval import Embedder, Retriever, evaluate_retriever, mine
from rag_retrieval.cli import main
from rag_retrieval.evaluate.retrieval_config import RetrievalEvaluationConfig
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.matching import lexical_score, maxsim
from rag_retrieval.retrieval.config import IndexConfig, IndexOptions
from rag_retrieval.retrieval.index import Index, build_index

ROOT = Path(__file__).resolve().parents[2]
ADDED = [{"_id": "new", "text": "A new panda."}, {"_id": "z1", "text": "大熊猫"}, documents()[3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return m3_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_file(tmp_path_factory.mktemp("corpus") / "c.jsonl")


def options(model, **more):
    own = {"embedder": model, "representations": ALL, "bm25": False, "device": "cpu", "shard_size": 10, "batch_size": 8}
    return IndexOptions(**own | more)


@pytest.fixture(scope="module")
def built(model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    build_index(corpus, folder, options(model))
    return folder


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copied"))


def slow_scores(model, texts, kinds=ALL, mean=True) -> dict[str, np.ndarray]:
    """[queries, documents] of each stage, pair by pair. mean: of the tokens of a query."""
    embedder, score = Embedder(model, device="cpu"), {
        "dense": lambda query, document: query @ document,
        "lexical": lexical_score,
        "multi_vector": lambda query, document: maxsim(query, document, mean),
    }  # fmt: skip
    queries, documents = (
        embedder.encode(each, kind=kind, outputs=kinds) for each, kind in ((QUERIES, "query"), (texts, "document"))
    )
    return {
        stage: np.array([[score[stage](query, document) for document in getattr(documents, stage)]
                         for query in getattr(queries, stage)])
        for stage in kinds
    }  # fmt: skip


def colbert(root: Path) -> str:
    tokens = EmbeddingModel.from_pretrained(tiny_bert(root / "b"), representations=("multi_vector",), colbert_dim=8)
    tokens.save_pretrained(root / "colbert")
    return str(root / "colbert")


def splade(root: Path) -> str:
    weights = EmbeddingModel.from_pretrained(tiny_bert(root / "b"), representations=("lexical",), lexical="splade")
    weights.save_pretrained(root / "splade")
    return str(root / "splade")


@pytest.mark.parametrize("make, kinds", [(m3_folder, ALL), (colbert, ("multi_vector",)), (splade, ("lexical",))])
def test_every_stage_finds_what_a_loop_over_all_pairs_finds(make, kinds, corpus, tmp_path):
    exact = {"vector_precision": "float32"} if "dense" in kinds else {}
    exact |= {"token_precision": "float32", "token_candidates": "all"} if "multi_vector" in kinds else {}
    model = make(tmp_path)
    index = build_index(corpus, tmp_path / "index", options(model, representations=kinds, **exact))
    assert list(index.searches) == list(kinds) and index.recall is index.token_recall is index.token_loss is None
    expected = slow_scores(model, [index.documents.text(row) for row in range(38)], kinds, mean=make is m3_folder)
    assert "lexical" not in kinds or (expected["lexical"].max(axis=1) > 0).sum() >= 2
    judged = [np.array([0, 37])] * len(QUERIES)
    for stage, search in index.searches.items():
        for found, scores in zip(search.search(QUERIES, judged, 12), expected[stage], strict=True):
            wanted = np.sort(scores)[::-1][:12]
            wanted = wanted[wanted > 0] if stage == "lexical" else wanted
            np.testing.assert_allclose(found.scores, wanted, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found.scores, scores[found.rows], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found.judged_scores, scores[[0, 37]], rtol=1e-5, atol=1e-5)


def test_token_vectors_score_the_candidates_of_the_dense_search(built, model):
    index = Index(built)
    expected = slow_scores(model, [index.documents.text(row) for row in range(38)])
    none = [np.zeros(0, np.int64)] * len(QUERIES)
    (dense, *_) = index.searches["dense"].search(QUERIES, none, 8)
    (found, *_) = index.searches["multi_vector"].search(QUERIES, none, 2)
    best = sorted(dense.rows.tolist(), key=lambda row: -expected["multi_vector"][0][row])[:2]
    assert found.rows.tolist() == best, "of four candidates for each document asked for"


def test_one_forward_serves_documents_and_another_queries(built, corpus, model, tmp_path, monkeypatch):
    encoded, encode = [], Embedder.encode

    def counting(self, texts, **how):
        encoded.append((how["kind"], len(texts)))
        return encode(self, texts, **how)

    monkeypatch.setattr(Embedder, "encode", counting)
    build_index(corpus, tmp_path / "index", options(model))
    assert encoded == [("document", 10), ("document", 10), ("document", 10), ("document", 8)]
    encoded.clear()
    with Retriever(built, device="cpu") as retriever:
        retriever.search_many(QUERIES)
        assert encoded == [("query", 4)]
        retriever.search_many(QUERIES[:2])
        assert encoded == [("query", 4), ("query", 2)]


@pytest.mark.parametrize("precision", ["float16", "int8", "residual2"])
def test_documents_that_stay_keep_what_was_computed_for_them(corpus, model, tmp_path, precision, monkeypatch):
    codes = {"token_precision": precision, "token_candidates": "tokens"}
    index = build_index(corpus, tmp_path / "index", options(model, **codes))
    before, rows = index.searches, np.arange(38)
    weights, tokens = before["lexical"].rows(rows), before["multi_vector"].documents.rows(rows)
    encoded, encode = [], Embedder.encode

    def counting(self, texts, **how):
        encoded.extend(texts)
        return encode(self, texts, **how)

    monkeypatch.setattr(Embedder, "encode", counting)
    ids = [index.documents.id(row) for row in range(38)]
    index.add(corpus_file(tmp_path / "added.jsonl", ADDED))
    assert encoded == ["A new panda.", "大熊猫"]
    stayed = [id_ for id_ in ids if id_ != "z1"]
    old, new = (np.array([each(id_) for id_ in stayed]) for each in (ids.index, index.documents.row_of_id))
    now = (index.searches["lexical"].rows(new), index.searches["multi_vector"].documents.rows(new))
    for kept, of_now in zip((weights, tokens), now, strict=True):
        texts = list(kept.texts())
        for place, of_text in zip(old.tolist(), of_now.texts(), strict=True):
            np.testing.assert_array_equal(texts[place], of_text)


def test_a_changed_index_searches_as_one_that_is_built_anew(copied, model, tmp_path):
    index, replaced = Index(copied), {row["_id"] for row in ADDED}
    index.add(corpus_file(tmp_path / "added.jsonl", ADDED))
    index.remove(["z2"])
    rows = [row for row in documents() if row["_id"] not in {"z2", *replaced}] + ADDED
    anew = build_index(corpus_file(tmp_path / "after.jsonl", rows), tmp_path / "anew", options(model))
    assert results(index) == results(anew) and index.token_recall == anew.token_recall


@pytest.mark.parametrize(
    "change, name, value",
    [({"representations": ["dense"]}, "representations", "['dense']"),
     ({"token_precision": "int8"}, "token_precision", "int8"), ({"pool_factor": 2}, "pool_factor", "2.0"),
     ({"token_candidates": "tokens"}, "has_token_lists", "True")],
)  # fmt: skip
def test_an_index_of_other_options_is_refused_by_name(copied, corpus, model, change, name, value):
    with pytest.raises(ValueError, match="is an index that differs") as caught:
        build_index(corpus, copied, options(model, **change))
    (line,) = [line for line in str(caught.value).splitlines() if ": was " in line]
    assert line.split(":")[0].strip() == name and value in line.partition("now")[2]


def test_candidates_are_taken_from_elsewhere_without_encoding_anew(copied, corpus, model):
    before = files_of(copied)
    index = build_index(corpus, copied, options(model, token_candidates="all"))
    assert index.searches["multi_vector"].is_exact and index.token_recall is None
    assert {name: data for name, data in files_of(copied).items() if name != "index.json"} == {
        name: data for name, data in before.items() if name != "index.json"
    }


def test_an_older_index_is_one_of_dense_vectors(corpus, model, tmp_path):
    build_index(corpus, tmp_path / "index", options(model, representations=("dense",)))
    file = tmp_path / "index" / "index.json"
    values = json.loads(file.read_text())
    del values["made_from"]["representations"], values["token_recall"], values["token_loss"]
    del values["options"]["representations"]
    file.write_text(json.dumps(values))
    assert list(Index(tmp_path / "index").searches) == ["dense"]
    with pytest.raises(ValueError, match=r"representations: was \['dense'\], now \['dense', 'lexical'\]"):
        build_index(corpus, tmp_path / "index", options(model, representations=("dense", "lexical")))


def test_token_vectors_are_pooled_to_a_fraction(built, corpus, model, tmp_path):
    index = build_index(corpus, tmp_path / "index", options(model, representations=("multi_vector",), pool_factor=2))
    whole = Index(built).searches["multi_vector"].documents
    pooled, rows = index.searches["multi_vector"].documents, np.arange(38)
    assert (pooled.counts(rows) <= whole.counts(rows) // 2 + 1).all() and (pooled.counts(rows) >= 1).all()


def test_sizes_and_what_is_lost_are_described(corpus, model, tmp_path, capsys):
    command = ["index", "--corpus", str(corpus), "--output", str(tmp_path / "index"), "--embedder", model, "--device",
               "cpu", "--representations", "dense,lexical,multi_vector", "--token_precision", "residual1",
               "--token_candidates", "tokens"]  # fmt: skip
    assert main(command) == 0
    printed, index = capsys.readouterr().out, Index(tmp_path / "index")
    for text in ("bm25 (english ", " weights; ", " vectors in residual1; ", "candidates of tokens have ", "; texts ",
                 "residual1 finds ", " of the 10 best by float32, nDCG@10 0."):  # fmt: skip
        assert text in printed, text
    parts = json.loads((tmp_path / "index" / "index.json").read_text())["parts"]
    files = [file for part in ("vectors", "ranges") for file in (tmp_path / "index" / parts[part]).glob("*/*")]
    assert sum(index.sizes[stage] for stage in ALL) == sum(file.stat().st_size for file in files)
    assert set(index.sizes) == {"texts", "bm25", *ALL}
    assert 0 < index.token_loss["recall"] < 1 and 0 < index.token_loss["ndcg"] < 1


def test_an_embedder_that_is_given_must_give_what_the_index_has(corpus, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    torch.save({"weight": torch.ones(1, 32), "bias": torch.ones(1)}, other / "sparse_linear.pt")
    lexical = build_index(corpus, tmp_path / "index", options(model, representations=("lexical",)))
    same = Index(lexical.folder, embedder=Embedder(model, device="cpu"))
    assert results(same) == results(lexical)
    with pytest.raises(ValueError, match="another vector for the first document than the index"):
        results(Index(lexical.folder, embedder=Embedder(str(other), device="cpu")))


@pytest.mark.parametrize(
    "values, message",
    [({"representations": "dense,dense"}, "representations\n  has one of them twice"),
     ({"representations": "lexical,multi_vector", "token_candidates": "dense"},
      "token_candidates\n  is dense, which is not among the representations"),
     ({"representations": "sparse"}, "representations")],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        IndexConfig(corpus="c", output="o", embedder="m", **values)


def test_candidates_come_from_the_first_search_that_is_there():
    given = {"embedder": "m", "bm25": False}
    chosen = [IndexOptions(**given, representations=each).token_candidates
              for each in (ALL, ("lexical", "multi_vector"), ("multi_vector",), ("dense",))]  # fmt: skip
    assert chosen == ["dense", "lexical", "tokens", None]
    assert IndexOptions(**given).representations == ("dense",) and IndexOptions().representations is None
    assert "vector_precision" in IndexOptions(**given, representations=("lexical",), vector_precision="int8").ignored


def test_a_representation_that_the_model_does_not_give_is_refused(corpus, tmp_path, model):
    plain = shutil.copytree(model, tmp_path / "plain")
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        (plain / name).unlink()
    with pytest.raises(ValueError, match="plain gives dense, and the index is of lexical; say representations: dense"):
        build_index(corpus, tmp_path / "index", options(str(plain), representations=("lexical",), bm25=True))
    assert not (tmp_path / "index").exists()


# ---- what is done with such an index


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return animal_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, model, tmp_path_factory):
    """Of words and all representations."""
    folder = tmp_path_factory.mktemp("whole") / "index"
    return build_index(data, folder, options(model, bm25=True, token_candidates="all")).folder


def test_all_stages_are_fused_with_fitted_weights(whole, data, tmp_path, capsys):
    index = shutil.copytree(whole, tmp_path / "index")
    assert main(["fit-fusion", "--index", str(index), "--data", str(data), "--split", "train", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {stage} " in printed for stage in ("bm25", *ALL, "fitted weights"))
    weights = json.loads((index / "fusion.json").read_text())["fitted"]["stages"]["best_weights"]
    assert list(weights) == ["bm25", *ALL] and sum(weights.values()) == pytest.approx(1)
    assert all(weight * 10 == pytest.approx(round(weight * 10)) for weight in weights.values())
    query = ["search", "--index", str(whole), "--query", "which panda lives near a river", "--device", "cpu"]
    assert main([*query, "--stages", "lexical,multi_vector", "--output_format", "json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    scores = [result["scores"].keys() for result in json.loads(line)["results"]]
    assert set().union(*scores) == {"lexical", "multi_vector", "fused"}


def test_the_commands_of_the_page_run(data, model, tmp_path, monkeypatch, capsys):
    """With a small corpus and a tiny model."""
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    section = page.partition("\n## Lexical weights and token vectors\n")[2].partition("\n## ")[0]
    commands = re.findall("^rag-retrieval .*", section, flags=re.MULTILINE)
    assert len(commands) == 6
    monkeypatch.chdir(tmp_path)
    for command in commands:
        named = command.replace("example_data/stdlib_beir", str(data)).replace("runs/m3_model", model)
        split = " --split train" if " evaluate " in command else ""
        assert main(shlex.split(named + split)[1:]) == 0, command
    printed = capsys.readouterr().out
    assert "candidates of dense have " in printed and "residual2 finds " in printed and "fitted weights" in printed


@pytest.mark.parametrize("candidates", ["lexical", "multi_vector"])
def test_mining_takes_candidates_of_an_index_or_of_a_model(whole, data, model, tmp_path, candidates):
    how = {"candidates": candidates, "device": "cpu", "sampling": "top", "num_negatives": 2}
    mine(config_of(data, tmp_path / "index.jsonl", index=str(whole), **how))
    mine(config_of(data, tmp_path / "model.jsonl", dense_model=model, dense_batch_size=8, **how))
    lines, own = (read_output(tmp_path / f"{name}.jsonl") for name in ("index", "model"))
    assert [line["query"] for line in lines] == [line["query"] for line in own]
    assert all(line["neg"] and not set(line["neg"]) & set(line["pos"]) for line in (*lines, *own))
    if candidates == "lexical":  # which is exact in both
        assert lines == own


def test_evaluation_searches_a_model_by_all_that_it_gives(whole, data, model, tmp_path):
    config = RetrievalEvaluationConfig(
        retriever=f"{whole},{model}", data=str(data), split="train", representations=ALL, device="cpu", batch_size=8,
        depth=10, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    found = {system.name: system.run for system in evaluate_retriever(config).systems}
    assert [name for name in found if name.startswith("m3")] == [f"m3 {stage}" for stage in (*ALL, "fused")]
    for stage in ALL:
        runs = zip(found[f"index {stage}"].values(), found[f"m3 {stage}"].values(), strict=True)
        for of_index, of_model in runs:
            np.testing.assert_allclose(list(of_index.values()), list(of_model.values()), atol=3e-3)
    for name in ("query_model", "corpus_embeddings", "faiss_index"):
        with pytest.raises(ValueError, match=f"{name}\n  is for dense vectors, and representations are lexical"):
            RetrievalEvaluationConfig(retriever=model, data=str(data), representations="lexical", **{name: "x"})
