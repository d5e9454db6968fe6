"""/search and /documents over ASGI, in this process, against `Retriever.search` on real tiny models."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from embedder_samples import save_by_sentence_transformers
from index_samples import ALL, QUERIES, corpus_file, documents, m3_folder
from serve_samples import client_of, listening, wait_until
from tiny_models import tiny_bert

from rag_retrieval import Embedder, Reranker, Retriever
from rag_retrieval.cli import main
from rag_retrieval.core.config_reader import load_config
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.fusion import Fusion
from rag_retrieval.retrieval.index import Index, build_index
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import EmbedModel
from rag_retrieval.serve.searching import SearchRequest
from rag_retrieval.serve.server import opened_service

pytest.importorskip("bm25s")

ROOT = Path(__file__).resolve().parents[2]
LONG = {"_id": "长/文 1", "text": "大熊猫主要吃竹子。" * 30, "year": 2030}
WHERE = {"year": {"gte": 2000, "lt": 2020}}
CLOSE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"embedder": m3_folder(root), "reranker": tiny_bert(root / "reranker", head_labels=1)}


@pytest.fixture(scope="module")
def rows():
    return [row | {"year": 1990 + place} for place, row in enumerate(documents())] + [LONG]


@pytest.fixture(scope="module")
def folder(models, rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("animals")
    options = IndexOptions(embedder=models["embedder"], representations=ALL, device="cpu", vector_precision="float32")
    return str(build_index(corpus_file(root / "c.jsonl", rows), root / "animals", options).folder)


@pytest.fixture(scope="module")
def words(rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    return str(build_index(corpus_file(root / "c.jsonl", rows), root / "words", IndexOptions()).folder)


@contextmanager
def serving(folder, models=None, **options):
    """models: with a reranker where given."""
    own = {} if models is None else {"model": models["reranker"], "max_length": 64}
    own |= {"index": folder, "device": "cpu", "timeout": 3600, "batch_tokens": 4096, "depth": 6}
    with opened_service(ServeConfig(**own | options), None) as service:
        yield service


@pytest.fixture(scope="module")
def service(folder, models):
    with serving(folder, models, long_document="max_slice") as running:
        yield running


def ask(service, body=None, path="/search", method="POST") -> httpx.Response:
    async def one():
        async with client_of(service) as client:
            return await client.request(method, path, json=body)

    return asyncio.run(one())


def check_results(answer, expected):
    """expected: SearchResults."""
    assert answer["query"] == expected.query and answer["score_type"] == expected.score_type
    assert [one["id"] for one in answer["results"]] == [one.doc_id for one in expected]
    for one, other in zip(answer["results"], expected, strict=True):
        found = (one["text"], one["rank"], one["metadata"], one["truncated"], one["ranks"])
        assert found == (other.text, other.rank, other.metadata, other.truncated, other.ranks)
        if other.slice is not None:
            assert (one["passage"]["start"], one["passage"]["end"]) == other.slice
        assert one["score"] == pytest.approx(other.score, **CLOSE)
        assert one["scores"] == pytest.approx(other.scores, **CLOSE)


@pytest.mark.parametrize("where", [None, WHERE, {"year": 2030}, {"animal": "nothing"}])
@pytest.mark.parametrize("raw", [False, True])
def test_what_is_answered_is_what_a_retriever_finds(service, folder, models, where, raw):
    reranker = Reranker(models["reranker"], max_length=64, device="cpu")
    options = {"reranker": reranker, "depth": 6, "long_document": "max_slice", "normalize": not raw, "device": "cpu"}
    with Retriever(folder, **options) as retriever:
        for query in QUERIES:
            answer = ask(service, {"query": query, "top_k": 4, "where": where, "raw_scores": raw}).json()
            check_results(answer, retriever.search(query, 4, where))
            assert answer["model"] == "animals" and len(answer["id"]) == 32
            assert answer.keys() == {"query", "results", "score_type", "id", "model"}
        more = ask(service, {"query": QUERIES[2], "top_k": 20, "raw_scores": raw}).json()
        check_results(more, retriever.search(QUERIES[2], 20))
        long = next(one for one in more["results"] if one["id"] == LONG["_id"])
        assert long["passage"]["end"] - long["passage"]["start"] < len(LONG["text"])


@pytest.mark.parametrize("representations", [("lexical",), ("multi_vector",), ("dense",)])
def test_every_kind_of_index_is_searched_as_a_retriever_does(representations, models, rows, tmp_path):
    options = IndexOptions(embedder=models["embedder"], representations=representations, device="cpu", bm25=False)
    index = build_index(corpus_file(tmp_path / "c.jsonl", rows), tmp_path / "index", options).folder
    with serving(str(index)) as service, Retriever(index, depth=6, device="cpu") as retriever:
        for query in QUERIES:
            check_results(ask(service, {"query": query}).json(), retriever.search(query))


def test_words_are_searched_without_a_model_and_several_queries_at_once(words):
    with serving(words) as service, Retriever(words, depth=6) as retriever:
        body = ask(service, {"query": QUERIES, "top_k": 3, "where": WHERE}).json()
        assert body.keys() == {"results", "id", "model"} and body["model"] == "words"
        for answer, expected in zip(body["results"], retriever.search_many(QUERIES, 3, WHERE), strict=True):
            check_results(answer, expected)
        assert ask(service, {"query": []}).json()["results"] == []
        assert ask(service, {"query": ""}).json()["results"] == []
        # of the text of 30 equal sentences the first is marked; all others are too short
        for top_k in (1, 2):
            answer = ask(service, {"query": QUERIES[2], "top_k": top_k, "stages": True}).json()
            found = {one["id"]: one["passage"] for one in answer["results"]}
            found |= {id_: one["passage"] for id_, one in answer["documents"].items()}
            assert found == {"z1": None, LONG["_id"]: {"start": 0, "end": 9}}
        assert ask(service, None, "/health", "GET").json()["models"] == {"index": "words"}
        assert ask(service, None, "/", "GET").text.startswith("<!doctype html>")


def test_stages_come_with_their_lists_seconds_and_documents(service, folder, rows):
    texts = {row["_id"]: row["text"] for row in rows}
    answer = ask(service, {"query": QUERIES[0], "top_k": 2, "stages": True, "where": WHERE}).json()
    names = ["bm25", *ALL, "fused", "reranked"]
    assert [stage["name"] for stage in answer["stages"]] == names
    assert all(0 < stage["seconds"] < 3600 for stage in answer["stages"])
    assert 0 < answer["encode_seconds"] < 3600 and 0 < answer["filter_seconds"] < 3600
    shown = {one["id"] for one in answer["results"]}
    found = {one["id"] for stage in answer["stages"] for one in stage["results"]}
    assert len(shown) == 2 and shown.isdisjoint(answer["documents"]) and shown | answer["documents"].keys() == found
    assert all(answer["documents"][id_]["text"] == texts[id_] for id_ in answer["documents"])
    assert all(2000 <= one["metadata"]["year"] < 2020 for one in answer["documents"].values())
    for stage in answer["stages"]:
        assert [one["rank"] for one in stage["results"]] == list(range(1, len(stage["results"]) + 1))
        ranks = {one["id"]: (one["rank"], one["score"]) for one in stage["results"]}
        for one in answer["results"]:
            own = (one["ranks"][stage["name"]], one["scores"][stage["name"]]) if stage["name"] in one["ranks"] else None
            assert ranks.get(one["id"]) == own
    (lists,) = Retriever(folder, depth=6, device="cpu").search_stages([QUERIES[0]], where=WHERE)
    ids = Index(folder).documents.id
    for stage in answer["stages"][:-1]:
        assert [one["id"] for one in stage["results"]] == [ids(row) for row in lists[stage["name"]].rows.tolist()]


def test_the_weight_of_a_reranker_makes_a_combined_stage(words, models):
    fusion = Fusion({"bm25": 1.0}, 0.4)
    fusion.save(Index(words).folder / "fusion.json", {})
    try:
        with serving(words, models) as service:
            answer = ask(service, {"query": QUERIES[0], "stages": True}).json()
        reranker = Reranker(models["reranker"], max_length=64, device="cpu")
        check_results(answer, Retriever(words, reranker=reranker, normalize=True, depth=6).search(QUERIES[0]))
        assert [stage["name"] for stage in answer["stages"]] == ["bm25", "reranked", "combined"]
    finally:
        (Index(words).folder / "fusion.json").unlink()


def series(service, name: str) -> dict[str, float]:
    """By model, those above 0."""
    text = ask(service, path="/metrics", method="GET").text
    found = re.findall(rf'^{name}{{model="(\w+)"}} (.+)$', text, re.MULTILINE)
    return {model: float(value) for model, value in found if float(value)}


def test_a_list_of_queries_is_reranked_in_common_batches_with_the_results_of_each(service):
    batches = "rag_retrieval_batch_items_count"
    before = series(service, batches)["reranker"]
    answers = ask(service, {"query": QUERIES[:3] + QUERIES[:1], "top_k": 4, "stages": True}).json()["results"]
    assert series(service, batches)["reranker"] == before + 1
    for query, answer in zip(QUERIES[:3] + QUERIES[:1], answers, strict=True):
        alone = ask(service, {"query": query, "top_k": 4, "stages": True}).json()
        assert answer["query"] == query and answer.keys() | {"id", "model", "meta"} >= alone.keys()
        for one, other in zip(answer["results"], alone["results"], strict=True):
            assert one["score"] == pytest.approx(other.pop("score"), **CLOSE)
            assert one["scores"] == pytest.approx(other.pop("scores"), **CLOSE)
            assert one | other == one
        ids, expected = ([[one["id"] for one in stage["results"]] for stage in of["stages"]] for of in (answer, alone))
        assert ids == expected


def test_reranked_documents_of_all_queries_count_towards_the_queue(words, models):
    with serving(words, models, queue_pairs=12, max_documents=12) as service:
        assert ask(service, {"query": ["panda", "tiger"]}).status_code == 422  # top_k is 10: 20 documents
        assert ask(service, {"query": ["panda", "tiger"], "top_k": 6}).status_code == 200
        service.admission.documents = 1
        assert ask(service, {"query": ["panda", "tiger"], "top_k": 6}).status_code == 429
        assert ask(service, {"query": "panda", "top_k": 6}).status_code == 200
        assert service.admission.documents == 1
        service.admission.documents = 0


def test_cut_queries_and_documents_are_told_and_counted(folder, models):
    name, long = "rag_retrieval_truncated_texts_total", "大熊猫主要吃竹子。" * 200
    with serving(folder, models) as service:
        answer = ask(service, {"query": "zebra", "where": WHERE}).json()
        assert "meta" not in answer and series(service, name) == {}
        answer = ask(service, {"query": ["panda", "熊猫"], "where": {"year": {"in": [1990, 2030]}}}).json()
        assert [[one["id"] for one in each["results"] if one["truncated"]] for each in answer["results"]] == [
            [LONG["_id"]], [LONG["_id"]]
        ]  # fmt: skip
        cut = "2 of 4 reranked documents were too long and were cut, the first of them '长/文 1' for query[0]"
        assert answer["meta"] == {"warnings": [cut]} and series(service, name) == {"reranker": 2.0}
        # another request, with one query and fewer results than are reranked
        answer = ask(service, {"query": long, "where": {"year": 1990}}).json()
        cut = ["1 of 1 queries were too long and were cut, the first of them query"]
        cut += ["1 of 1 reranked documents were too long and were cut, the first of them 'panda-river' for query"]
        assert answer["meta"] == {"warnings": cut} and series(service, name) == {"reranker": 3.0, "embedder": 1.0}
    with serving(folder) as service:
        answer = ask(service, {"query": ["a", long, "b", long]}).json()
        cut = "2 of 4 queries were too long and were cut, the first of them query[1]"
        assert answer["meta"] == {"warnings": [cut]} and "meta" not in answer["results"][1]
        assert series(service, name) == {"embedder": 2.0}


def test_a_document_is_given_whole_by_its_id(service, rows):
    for id_ in ("panda-river", LONG["_id"]):
        response = ask(service, None, f"/documents/{id_}", "GET")
        row = next(row for row in rows if row["_id"] == id_)
        assert response.status_code == 200
        metadata = row.get("metadata", {}) | {"year": row["year"]}
        assert response.json() == {"id": id_, "text": row["text"], "metadata": metadata}
        assert "connection" not in response.headers  # else the server had waited for a body that never comes
    for id_ in ("nothing", "", "panda-river/", "panda\nriver"):
        response = ask(service, None, f"/documents/{quote(id_)}", "GET")
        assert response.status_code == 404 and f"no document {id_!r}" in response.json()["message"]


@pytest.mark.parametrize(
    "body, message",
    [
        ({}, "query: "),
        ({"query": 3}, "query: "),
        ({"query": ["a", 3]}, "query[1]: "),
        ({"query": {"text": "a"}}, "query"),
        ({"query": "a", "top_k": 0}, "top_k: "),
        ({"query": "a", "top_k": 1001}, "top_k: "),
        ({"query": "a", "top_k": "3"}, "top_k: "),
        ({"query": "a", "stages": 1}, "stages: "),
        ({"query": "a", "filter": {}}, "filter: this server does not know the key"),
        ({"query": ["a"] * 33}, "query: at most 32 are taken"),
        ({"query": "a" * 100_001}, "query: found 100001 characters, at most 100000"),
        ({"query": ["a"] * 32, "top_k": 1000}, "query: 32 queries, of each of which 1000 documents are reranked"),
        ({"query": "a", "where": []}, "where: "),
        ({"query": "a", "where": {"year": [2020]}}, "where: year: expected a string, a number"),
        ({"query": "a", "where": {"year": {"gte": {"gte": 1}}}}, "where: year.gte: expected a number or a string"),
        ({"query": "a", "where": {"yaer": 2020}}, "where: yaer: no document has a value there; the fields are year"),
        ({"query": "a", "where": {"year": "2020"}}, "where: year: expected a number"),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_expected(service, body, message):
    response = ask(service, body)
    assert response.status_code == 422 and response.json()["message"].startswith(message), response.text


def test_conditions_nested_a_thousand_deep_are_refused(service):
    text = '{"query": "a", "where": ' + '{"a": ' * 1000 + "1" + "}" * 1001

    async def one():
        async with client_of(service) as client:
            return await client.post("/search", content=text, headers={"Content-Type": "application/json"})

    assert asyncio.run(one()).status_code in (400, 422)


def test_the_embedder_of_the_index_answers_for_embeddings_and_is_opened_once(folder, models, monkeypatch):
    opened, init = [], Embedder.__init__
    monkeypatch.setattr(Embedder, "__init__", lambda self, *own, **more: opened.append(own) or init(self, *own, **more))
    with serving(folder) as service:
        assert len(opened) == 1
        vectors = ask(service, {"input": "water"}, "/v1/embeddings").json()["data"]
        assert len(vectors[0]["embedding"]) == 32
    opened.clear()
    with serving(folder, embedder=models["embedder"]) as service:
        assert len(opened) == 1
        expected = Retriever(folder, depth=6, device="cpu").search(QUERIES[1])
        check_results(ask(service, {"query": QUERIES[1]}).json(), expected)


def test_the_index_is_opened_once_beside_an_embedder(folder, models, monkeypatch):
    opened, init = [], Index.__init__
    monkeypatch.setattr(Index, "__init__", lambda self, *own, **more: opened.append(own) or init(self, *own, **more))
    with serving(folder, embedder=models["embedder"]):
        assert opened == [(folder,)]


def test_another_embedder_leaves_the_index_its_own(folder, tmp_path):
    other = tiny_bert(tmp_path / "other", seed=3)
    save_by_sentence_transformers(other, tmp_path / "embedder", "mean")
    with serving(folder, embedder=str(tmp_path / "embedder"), embedder_name="other") as service:
        check_results(
            ask(service, {"query": QUERIES[1]}).json(), Retriever(folder, depth=6, device="cpu").search(QUERIES[1])
        )
        assert ask(service, {"input": "water"}, "/v1/embeddings").json()["model"] == "other"
        metrics = ask(service, path="/metrics", method="GET").text
        counted = re.findall(r'^rag_retrieval_tokens_total\{model="(\w+)"\} (?!0\.0)', metrics, re.MULTILINE)
        assert counted == ["embedder", "index_embedder"]


def test_an_index_that_changes_is_searched_as_it_is_now(rows, tmp_path, caplog):
    file = corpus_file(tmp_path / "c.jsonl", rows)
    index = build_index(file, tmp_path / "index", IndexOptions())
    with serving(str(index.folder)) as service:
        asked = {"query": "zebra", "where": {"year": 2040}}
        assert "no document has" not in ask(service, asked | {"where": None}).text
        assert ask(service, asked).json()["results"] == []
        index.add(corpus_file(tmp_path / "new.jsonl", [{"_id": "new", "text": "A zebra.", "year": 2040}]))
        assert [one["id"] for one in ask(service, asked).json()["results"]] == ["new"]
        assert ask(service, None, "/documents/new", "GET").status_code == 200
        (tmp_path / "index" / "index.json").write_text("{}")
        assert [one["id"] for one in ask(service, asked).json()["results"]] == ["new"]
        ask(service, asked)
        assert [record.levelname for record in caplog.records if "cannot be opened" in record.message] == ["ERROR"]


def test_an_index_of_other_words_does_not_take_the_place_of_the_one_that_is_open(rows, tmp_path, caplog):
    file = corpus_file(tmp_path / "c.jsonl", rows)
    index = build_index(file, tmp_path / "index", IndexOptions())
    other = build_index(file, tmp_path / "other", IndexOptions(language="german"))
    with serving(str(index.folder)) as service:
        index.folder.rename(tmp_path / "away")
        other.folder.rename(tmp_path / "index")
        before = ask(service, {"query": "zebra"}).json()["results"]
        assert [one["id"] for one in before] == [one.doc_id for one in Retriever(tmp_path / "away").search("zebra")]
        assert "made in another way now (words)" in caplog.text


def test_a_request_whose_client_leaves_is_dropped(folder, models, monkeypatch):
    """While the embedder computes for another one, so that it never reaches the searches."""
    entered, gate, compute = threading.Event(), threading.Event(), EmbedModel.compute
    searched, find = [], Retriever.find

    def gated(self, items):
        entered.set()
        assert gate.wait(60)
        return compute(self, items)

    gate.set()
    monkeypatch.setattr(EmbedModel, "compute", gated)
    monkeypatch.setattr(
        Retriever, "find", lambda self, queries, *of: searched.extend(queries) or find(self, queries, *of)
    )
    with serving(folder, models) as service:
        batcher = service.batchers["embedder"]
        for started in (gate, entered, searched):
            started.clear()

        async def leave():
            async with client_of(service) as client:
                first = asyncio.create_task(client.post("/search", json={"query": "first"}))
                await asyncio.to_thread(entered.wait, 60)
                second = asyncio.create_task(client.post("/search", json={"query": "second"}))
                await asyncio.to_thread(wait_until, lambda: batcher.waiting_items() == 1)
                second.cancel()
                await asyncio.gather(second, return_exceptions=True)
                await asyncio.to_thread(wait_until, lambda: batcher.waiting_items() == 0)
                gate.set()
                return await first

        assert asyncio.run(leave()).status_code == 200
        assert searched == ["first"] and service.admission.requests == 0 and service.admission.documents == 0


def test_the_commands_of_the_page_are_answered_as_it_says(models, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8").partition("\n## Search\n")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", "docs")
    shutil.copytree(models["reranker"], "runs/a/model")
    index, start, search, document = re.split(r"\n(?=[a-z])", "\n".join(re.findall(r"```bash\n(.*?)\n```", page, re.S)))
    assert main(shlex.split(index)[1:]) == 0
    assert load_config(ServeConfig, None, shlex.split(start)[2:]).model.endswith("runs/a/model")
    assert set(re.findall(r"`--([a-z_]+)", page)) <= {*ServeConfig.model_fields, "add", "remove"}
    answers = []
    with serving("runs/docs") as service, listening(service) as address:
        for command in (search, document):
            arguments = shlex.split(command.replace("http://127.0.0.1:8080", address))
            done = subprocess.run([*arguments, "--silent", "--fail-with-body"], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            answers.append(json.loads(done.stdout))
    (shown,) = map(json.loads, re.findall(r"```json\n(.*?)```", page, re.S))
    assert answers[0].keys() == shown.keys() and answers[0]["results"][0].keys() == shown["results"][0].keys()
    assert answers[1]["id"] == "search.md#1" and answers[1].keys() == {"id", "text", "metadata"}
    assert all(f"`{key}`" in page for key in SearchRequest.model_fields)


@pytest.mark.slow
def test_32_clients_get_their_own_answers(folder, models):
    """Over sockets; each asks for another query, filter and number of results."""
    asked = [
        {
            "query": QUERIES[place % 4][: 5 + place % 9],
            "top_k": 1 + place % 5,
            "where": {"year": {"gte": 1990 + place % 30}},
        }
        for place in range(256)
    ]
    reranker = Reranker(models["reranker"], max_length=64, device="cpu")
    retriever = Retriever(folder, reranker=reranker, depth=6, normalize=True, device="cpu")
    with serving(folder, models) as service, listening(service) as address:

        def post(body):
            return httpx.post(f"{address}/search", json=body, timeout=600).json()

        with ThreadPoolExecutor(32) as clients:
            answers = list(clients.map(post, asked))
    expected = {}
    for body, answer in zip(asked, answers, strict=True):
        key = json.dumps(body)
        if key not in expected:
            expected[key] = retriever.search(**body)
        check_results(answer, expected[key])
