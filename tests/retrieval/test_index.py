"""Indexes that are built, opened, changed and refused."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from index_samples import QUERIES, corpus_file, documents, files_of, results
from tiny_models import tiny_bert

from rag_retrieval import Embedder
from rag_retrieval.core.files import locked
from rag_retrieval.data.records import DataError
from rag_retrieval.retrieval import building
from rag_retrieval.retrieval.building import LOCAL, update
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.index import Index, build_index
from rag_retrieval.retrieval.index_files import IndexState


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_file(tmp_path_factory.mktemp("corpus") / "c.jsonl")


def options(model, **more):
    return IndexOptions(embedder=model, shard_size=10, batch_size=8, **{"pooling": "mean", "device": "cpu"} | more)


@pytest.fixture(scope="module")
def built(model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    build_index(corpus, folder, options(model))
    return folder


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copied"))


@pytest.mark.parametrize(
    "more, message",
    [
        ({"faiss_index": "Flut"}, "faiss_index 'Flut': FAISS cannot make this index"),
        ({"faiss_index": "PQ3", "dim": 32}, "faiss_index 'PQ3': FAISS cannot make this index"),
        ({"faiss_index": "IVF2,Flat", "faiss_search": "nprove=3"}, "faiss_search 'nprove=3': this index takes no such"),
    ],
)
def test_what_faiss_does_not_know_is_refused_before_anything_is_encoded(corpus, model, tmp_path, more, message):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=message):
        build_index(corpus, tmp_path / "index", options(model, **more))
    assert not (tmp_path / "index").exists()


def test_missing_libraries_are_named_before_anything_is_built(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="faiss_index needs FAISS; run: pip install"):
        build_index(corpus, tmp_path / "index", options(model, faiss_index="Flat"))
    monkeypatch.setattr(building, "BM25_LIBRARIES", ("bm25s", "no_such_library"))
    with pytest.raises(ValueError, match="an index of words needs no_such_library; run: pip install"):
        build_index(corpus, tmp_path / "index", options(model))
    assert not (tmp_path / "index").exists()


def test_documents_come_back_with_ids_and_metadata_and_are_found_by_words_and_vectors(built, model):
    index = Index(built)
    assert len(index) == 38 and index.documents.id(36) == "z1" and index.documents.text(36) == "大熊猫主要吃竹子"
    assert index.documents.metadata(0) == {"animal": "panda"} and index.documents.metadata(36) == {}
    assert list(index.searches) == ["bm25", "dense"]
    found = results(index)
    assert found["bm25"][0][0][0] == "panda-river" and found["bm25"][2][0][0] == "z1" and len(found["bm25"][3]) == 2
    embedder = Embedder(model, pooling="mean", device="cpu")
    texts = [index.documents.text(row) for row in range(38)]
    scores = embedder.encode_queries(QUERIES) @ embedder.encode_documents(texts).T
    for place, of_query in enumerate(found["dense"]):
        np.testing.assert_allclose([score for _, score in of_query[:12]], np.sort(scores[place])[::-1][:12], atol=2e-3)
        np.testing.assert_allclose([score for _, score in of_query[12:]], scores[place][[0, 37]], atol=2e-3)


def test_parts_are_added_to_an_index_and_nothing_is_built_twice(corpus, model, tmp_path):
    build_index(corpus, tmp_path / "index", IndexOptions())
    before = files_of(tmp_path / "index")
    assert list(Index(tmp_path / "index").searches) == ["bm25"]
    build_index(corpus, tmp_path / "index", options(model, bm25=False))
    both = files_of(tmp_path / "index")
    assert both.items() >= {name: data for name, data in before.items() if name != "index.json"}.items()
    assert list(Index(tmp_path / "index").searches) == ["bm25", "dense"]
    build_index(corpus, tmp_path / "index", IndexOptions())
    assert files_of(tmp_path / "index") == both, "vectors stay where they are not asked for"


@pytest.mark.parametrize(
    "change",
    [{"max_length": 9}, {"prompts": {"query": "q: "}}, {"pooling": "cls"}, {"dim": 8}, {"normalize": False},
     {"vector_precision": "float32"}, {"language": "german"}, {"precision": "bf16"}],
)  # fmt: skip
def test_an_index_of_other_options_is_refused_and_the_message_names_them(copied, corpus, model, change):
    before = files_of(copied)
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match="is an index that differs") as caught:
        build_index(corpus, copied, options(model, **change))
    (line,) = [line for line in str(caught.value).splitlines() if ": was " in line]
    assert line.split(":")[0].strip() == {"language": "words"}.get(name, name)
    assert str(value) in line.partition("now")[2]
    assert {name: data for name, data in files_of(copied).items() if name in before} == before


def test_another_seed_is_refused_where_something_was_drawn_by_it(copied, corpus, model, tmp_path):
    build_index(corpus, copied, options(model, seed=7))
    build_index(corpus, tmp_path / "int8", options(model, vector_precision="int8"))
    with pytest.raises(ValueError, match="\n  seed: was 42, now 7\n"):
        build_index(corpus, tmp_path / "int8", options(model, vector_precision="int8", seed=7))


def test_another_model_or_corpus_is_refused_by_name(copied, corpus, model, tmp_path):
    other = tiny_bert(tmp_path / "other", layers=1)
    with pytest.raises(ValueError, match="\n  model: was '"):
        build_index(corpus, copied, options(other))
    names = {path.name for path in copied.iterdir()}
    with pytest.raises(ValueError, match="\n  corpus: was '38 documents, .*, now '37 documents, "):
        build_index(corpus_file(tmp_path / "c.jsonl", documents()[1:]), copied, options(model))
    assert {path.name for path in copied.iterdir()} == names, "nothing of the other corpus stays"
    texts = tmp_path / "texts.md"
    texts.write_text("a b c")
    with pytest.raises(ValueError, match="\n  passage_tokens: was 200, now 100"):
        for tokens in (200, 100):
            build_index(texts, tmp_path / "texts-index", IndexOptions(passage_tokens=tokens))


def test_the_same_documents_from_another_file_are_the_same_corpus(copied, model, tmp_path):
    before = Index(copied).made_from
    assert build_index(corpus_file(tmp_path / "other_name.jsonl"), copied, options(model)).made_from == before


def test_a_model_that_changed_since_is_not_used(corpus, model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    index = build_index(corpus, tmp_path / "index", options(str(own)))
    (own / "README.md").write_text("other")
    assert index.searches["bm25"].search(QUERIES, [np.zeros(0, int)] * 4, 3)
    with pytest.raises(ValueError, match="own now holds another model than the index was made with .model: was"):
        index.searches["dense"].search(QUERIES, [np.zeros(0, int)] * 4, 3)
    before = files_of(tmp_path / "index")
    with pytest.raises(ValueError, match="\n  model: was '.*', now '"):
        index.add(corpus_file(tmp_path / "a.jsonl", changed_rows()))
    assert files_of(tmp_path / "index") == before
    index.remove(["z1"])  # encodes nothing
    assert len(index) == 37


def test_words_that_are_made_in_another_way_now_are_not_searched(copied, monkeypatch):
    monkeypatch.setattr("rag_retrieval.retrieval.index_files.WORDS_VERSION", 99)
    with pytest.raises(ValueError, match="words: was 'auto, version .', now 'auto, version 99'.; build the"):
        Index(copied)


def test_a_closed_index_opens_its_embedder_again(built, model):
    index = Index(built)
    first = index.embedder
    assert index.embedder is first
    index.close()
    assert results(index) and index.embedder is not first
    given = Embedder(model, pooling="mean", device="cpu")
    index = Index(built, embedder=given)
    assert index.embedder is given
    index.close()
    assert given.encode("a").shape == (32,), "who opened it closes it"


def test_an_embedder_that_is_given_must_give_the_vectors_of_the_index(built, model, tmp_path):
    own = Index(built, embedder=Embedder(model, pooling="mean", device="cpu"))
    assert results(own) == results(Index(built))
    for other in ({"pooling": "cls"}, {"prompts": {"document": "What else is written here: "}}):
        with pytest.raises(ValueError, match="another vector for the first document than the index; expected"):
            results(Index(built, embedder=Embedder(model, device="cpu", **{"pooling": "mean"} | other)))


# ---- changes


def changed_rows() -> list[dict]:
    """What is added: a new document, one that changes, one that stays; and the rows of all after that."""
    return [{"_id": "new", "text": "A new panda."}, {"_id": "z1", "text": "大熊猫"}, documents()[3]]


def rows_after(added: list[dict], removed: set[str]) -> list[dict]:
    ids = {row["_id"] for row in added} | removed
    return [row for row in documents() if row["_id"] not in ids] + added


@pytest.mark.parametrize(
    "more",
    [{}, {"vector_precision": "binary", "rescore_precision": "float16"}, {"faiss_index": "IVF2,Flat"}],
)
def test_a_changed_index_searches_as_one_that_is_built_anew(corpus, model, tmp_path, more):
    if "faiss_index" in more:
        pytest.importorskip("faiss")
    index = build_index(corpus, tmp_path / "index", options(model, **more))
    added = corpus_file(tmp_path / "added.jsonl", changed_rows())
    index.add(added)
    index.remove(["tiger-river", "z2"])
    rows = rows_after(changed_rows(), {"tiger-river", "z2"})
    anew = build_index(corpus_file(tmp_path / "after.jsonl", rows), tmp_path / "anew", options(model, **more))
    assert [index.documents.id(row) for row in range(len(index))] == [row["_id"] for row in rows]
    assert results(index) == results(anew) == results(Index(tmp_path / "index"))
    assert index.made_from == anew.made_from and index.recall == anew.recall
    build_index(tmp_path / "after.jsonl", tmp_path / "index", options(model, **more))  # is the same index


def test_int8_vectors_keep_their_ranges_when_documents_are_added(corpus, model, tmp_path):
    index = build_index(corpus, tmp_path / "index", options(model, vector_precision="int8"))
    vectors, ranges = np.concatenate(list(index.vectors())), IndexState.read(index.folder).parts["ranges"]
    index.add(corpus_file(tmp_path / "added.jsonl", [{"_id": "new", "text": "zebra " * 40}]))
    assert IndexState.read(index.folder).parts["ranges"] == ranges
    np.testing.assert_array_equal(np.concatenate(list(index.vectors()))[:-1], vectors)


def test_only_new_texts_are_encoded(copied, tmp_path, monkeypatch):
    index, encoded = Index(copied), []
    encode = Embedder.encode

    def counting(self, texts, **how):
        encoded.extend(texts)
        return encode(self, texts, **how)

    monkeypatch.setattr(Embedder, "encode", counting)
    index.add(corpus_file(tmp_path / "added.jsonl", changed_rows()))
    assert encoded == ["A new panda.", "大熊猫"]
    index.remove(["new"])
    assert encoded == ["A new panda.", "大熊猫"]


def test_changes_that_cannot_be_are_refused_and_leave_the_index(copied):
    index, before = Index(copied), files_of(copied)
    with pytest.raises(DataError, match="2 of the ids to remove are in no document, such as 'no', 'nothing'."):
        index.remove(["no", "nothing", "z1"])
    with pytest.raises(DataError, match="no document would be left"):
        index.remove([row["_id"] for row in documents()])
    assert {name: data for name, data in files_of(copied).items() if name in before} == before
    assert results(index) == results(Index(copied))


def test_a_reader_keeps_its_index_while_another_changes_it(copied):
    reader, before = Index(copied), results(Index(copied))
    Index(copied).remove(["z1", "panda-river"])
    assert results(reader) == before and reader.documents.row_of_id("z1") == 36
    assert len(Index(copied)) == 36


def test_an_index_that_is_switched_while_it_is_opened_is_the_new_one(copied, monkeypatch):
    check, calls = IndexState.check_files, []

    def changing(self):
        calls.append(1)
        if len(calls) == 1:
            Index(copied).remove(["z1"])
        check(self)

    monkeypatch.setattr(IndexState, "check_files", changing)
    assert len(Index(copied)) == 37 and Index(copied).documents.row_of_id("z1") is None


# ---- attacks


def test_empty_and_huge_and_repeated_texts_are_documents(model, tmp_path):
    rows = [{"_id": "e", "text": ""}, {"_id": "h", "text": "panda " * 17_000}, {"_id": "1", "text": "bamboo"},
            {"_id": "2", "text": "bamboo"}]  # fmt: skip
    index = build_index(corpus_file(tmp_path / "c.jsonl", rows), tmp_path / "index", options(model))
    assert len(index) == 4 and len(index.documents.text(1)) == 102_000
    found = index.searches["bm25"].search(["bamboo"], [np.array([0])], 5)[0]
    assert found.rows.tolist() == [2, 3] and found.judged_scores.tolist() == [0]
    assert np.isfinite(np.concatenate(list(index.vectors()))).all()


def test_repeated_ids_are_refused(tmp_path):
    with pytest.raises(DataError, match="documents 1 and 39 of the corpus have the same id, 'panda-river'"):
        build_index(corpus_file(tmp_path / "c.jsonl", documents() + documents()[:1]), tmp_path / "index")
    with pytest.raises(ValueError, match="index: no finished index; rag-retrieval index writes one"):
        Index(tmp_path / "index")


def test_a_damaged_file_is_named_when_the_index_is_opened(copied):
    state = IndexState.read(copied)
    for name in (next(iter(state.sizes)), f"{state.parts['vectors']}/shard-000002/vectors.npy"):
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{name}: has {len(whole) - 1:,} bytes, and {len(whole):,} bytes were"):
            Index(copied)
        (copied / name).unlink()
        with pytest.raises(ValueError, match=f"{name}: is missing"):
            Index(copied)
        (copied / name).write_bytes(whole)
    values = json.loads((copied / "index.json").read_text())
    changes = [{"options": {"color": 1}}, {"parts": {"bm25": "bm25-0123456789abcdef"}}, {"parts": {"corpus": "../c"}},
               {"new": 1}]  # fmt: skip
    damaged = [{}, {"format": 1}, *(values | change for change in changes)]
    for content in ("{", "[]", *map(json.dumps, damaged)):
        (copied / "index.json").write_text(content)
        with pytest.raises(ValueError, match="index.json: it is damaged; remove the folder and build the index again"):
            Index(copied)
    (copied / "index.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="index.json: it is of the format 99, and this version reads 1; remove"):
        Index(copied)


def test_a_damaged_index_is_neither_continued_nor_changed(copied, corpus, model, tmp_path):
    state = IndexState.read(copied)
    shard = copied / state.parts["vectors"] / "shard-000001" / "vectors.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    build = partial(build_index, corpus, copied, options(model))
    for change in (build, partial(update, copied, None, ["z1"], LOCAL, {})):
        with pytest.raises(ValueError, match="vectors.npy: has .* bytes were written; the index is damaged"):
            change()
    shard.write_bytes(b"\0" * len(whole))
    with pytest.raises(ValueError, match="000001/vectors.npy: this is no file of vectors .*; the index is damaged"):
        Index(copied)


def test_folders_that_are_no_index_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="nowhere: no such folder; rag-retrieval index writes one"):
        Index(tmp_path / "nowhere")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things .mine.txt.; take a folder that is empty"):
        build_index(corpus, tmp_path)
    with pytest.raises(ValueError, match="mine.txt is a file; give the name of a folder"):
        build_index(corpus, tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_second_writer_is_refused(copied, corpus):
    with locked(copied / ".lock", "busy"):
        with pytest.raises(ValueError, match="another process writes this index; wait for it"):
            build_index(corpus, copied)
        with pytest.raises(ValueError, match="another process writes this index; wait for it"):
            Index(copied).remove(["z1"])
        assert len(Index(copied)) == 38, "readers are not kept out"


def test_index_json_names_everything_that_the_index_depends_on(built):
    made_from = json.loads((built / "index.json").read_text())["made_from"]
    assert made_from.keys() == {
        "corpus", "words", "model", "model_type", "dtype", "precision", "max_length",
        "attn_implementation", "query_max_length", "pooling", "prompts", "include_prompt", "cls_interval", "normalize",
        "bidirectional", "representations", "dim", "vector_precision", "rescore_precision",
    }  # fmt: skip
