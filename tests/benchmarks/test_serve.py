import asyncio
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serve as serve_benchmark

SCORES = np.array([0.5, 2.0, -1.0])
RIGHT = [{"index": 1, "score": 2.0}, {"index": 0, "score": 0.5}, {"index": 2, "score": -1.0}]


def test_a_right_answer_has_every_text_once_best_first_with_its_score():
    right = partial(serve_benchmark.has_scores, scores=SCORES)
    assert right(RIGHT)
    assert not serve_benchmark.has_scores(RIGHT, SCORES[[0, 2, 1]])
    assert not right(RIGHT[:2])
    assert not right([RIGHT[0], RIGHT[0], RIGHT[2]])
    assert not right([RIGHT[1], RIGHT[0], RIGHT[2]])
    assert not right([RIGHT[0], RIGHT[1], {"index": 2, "score": -1.001}])


def test_a_right_answer_has_the_vector_of_each_text_at_its_place():
    vectors = np.array([[0.6, 0.8], [1.0, 0.0]])
    entries = [{"index": index, "embedding": row} for index, row in enumerate(vectors.tolist())]
    assert serve_benchmark.has_vectors({"data": entries}, vectors)
    assert not serve_benchmark.has_vectors({"data": entries}, vectors[::-1])
    assert not serve_benchmark.has_vectors({"data": entries[::-1]}, vectors)
    assert not serve_benchmark.has_vectors({"data": entries[:1]}, vectors)
    assert not serve_benchmark.has_vectors({"data": [entries[0], {"index": 1, "embedding": [1.0]}]}, vectors[:, :1])


def test_a_right_search_has_the_best_documents_in_order(monkeypatch):
    monkeypatch.setattr(serve_benchmark, "TOP_K", 2)
    found = [("a", 3.0), ("b", 2.0), ("c", 2.0), ("d", 1.0)]

    def right(*results: tuple[str, float]) -> bool:
        answer = {"results": [{"id": name, "score": score} for name, score in results]}
        return serve_benchmark.has_results(answer, found)

    assert right(("a", 3.0), ("b", 2.0)) and right(("a", 3.0), ("c", 2.0))  # b and c are equal
    assert not right(("b", 2.0), ("a", 3.0)) and not right(("a", 3.0)) and not right(("a", 3.0), ("a", 3.0))
    assert not right(("a", 3.0), ("d", 1.0)) and not right(("a", 3.0), ("e", 2.0)) and not right(("a", 3.0), ("b", 1.9))


def test_requests_are_the_same_again_and_right_as_each_text_alone(model_folders):
    first, again = (serve_benchmark.rerank_questions(model_folders["bert"], 3, 4, 10) for _ in range(2))
    assert [question.body for question in first] == [question.body for question in again]
    assert all(len(question.body["texts"]) == question.texts for question in first)
    assert len({question.body["query"] for question in first}) == 3


def test_refusals_broken_connections_and_wrong_answers_are_counted_apart():
    async def answer(request: web.Request) -> web.Response:
        number = next(numbers)
        if number == 2:
            request.transport.close()
        return web.Response(status=429) if number == 1 else web.json_response(RIGHT)

    numbers = iter(range(5))
    outcome = serve_benchmark.Outcome()

    async def ask_five():
        app = web.Application()
        app.router.add_post("/rerank", answer)
        server = TestServer(app)
        async with server, serve_benchmark.client_of(str(server.make_url("/"))) as client:
            for scores in (SCORES, SCORES, SCORES, SCORES, SCORES[::-1]):
                is_right = partial(serve_benchmark.has_scores, scores=scores)
                await serve_benchmark.ask(client, serve_benchmark.Question("/rerank", {}, 3, is_right), outcome)

    asyncio.run(ask_five())
    assert (outcome.sent, outcome.answered, outcome.statuses[429], outcome.failed, outcome.wrong) == (5, 3, 1, 1, 1)


@pytest.mark.slow
def test_a_small_run_answers_everything_right_or_refuses_it(tmp_path, monkeypatch, capsys):
    model = tiny_bert(tmp_path / "model", head_labels=1)
    arguments = ["--model", model, "--concurrencies", "1", "4", "--seconds", "1", "--questions", "10"]
    arguments += ["--steady", "50", "--beside"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments, "--serve", "--queue_requests", "16", "--timeout", "3600"])
    serve_benchmark.main()
    printed = capsys.readouterr().out
    rows = [line.split()[-4:] for line in printed.splitlines() if "at once" in line or "afterwards" in line]
    assert len(rows) == 3 and all(row[0] == row[1] and row[2:] == ["0", "0"] for row in rows)
    turns = re.findall(
        r"(\d+) sent .* (\d+) answered, (\d+) refused with 429, (\d+) connections.* others \{\}, 0 wrong", printed
    )
    for sent, answered, refused, broken in (map(int, turn) for turn in turns):
        # how fast this machine sends decides how many are refused, and whether a refused one still sends its body when
        # the server stops waiting for it and closes the connection
        assert sent == answered + refused + broken and answered > 0
    assert len(turns) == 2, printed
    assert re.search(r"\n50 requests answered of 50, 0 lost, 0 wrong; memory in MiB after each tenth: ", printed)
    assert len(re.findall(r"requests/s \(.*\), p50 .* 0 wrong", printed)) == 2, "sentence-transformers too is right"
