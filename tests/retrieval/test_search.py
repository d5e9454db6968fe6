"""The commands `search` and `fit-fusion`, in this process."""

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from beir_samples import write_lines
from embedder_samples import save_by_sentence_transformers
from rich.cells import cell_len
from tiny_models import tiny_bert

from rag_retrieval import Retriever
from rag_retrieval.cli import main
from rag_retrieval.data.beir import read_run
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.fit_fusion import WEIGHTS, FusionFit
from rag_retrieval.retrieval.fusion import Fusion
from rag_retrieval.retrieval.index import build_index

pytest.importorskip("bm25s")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "search.md"

CORPUS = [
    {"_id": "steam", "title": "Steam", "text": "Water boils at 100 degrees. " * 15, "year": 1999},
    {"_id": "ice", "text": "Water freezes at 0 degrees."},
    {"_id": "茶", "text": "水在一百度沸腾，泡茶的水要开。" * 15, "来源": "百科"},
    {"_id": "iron", "text": "Iron melts at 1538 degrees.\x1b[31m"},
    {"_id": "\x1b[31mred\u202eline", "text": "violet"},
]

NAMES = ["apple", "river", "engine", "planet", "violin", "harbor", "desert", "copper"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("models") / "reranker", head_labels=1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    write_lines(root / "corpus.jsonl", CORPUS)
    return str(build_index(root / "corpus.jsonl", root / "index", IndexOptions()).folder)


@pytest.fixture
def search(index, capsys, tmp_path, monkeypatch):
    """Exit code, stdout and stderr of the command, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        code = main(["search", "--index", index, *options])
        return code, *capsys.readouterr()

    return run


def test_text_has_rank_id_scores_metadata_and_the_beginning(search):
    code, out, _ = search("--query", "boiling water")
    assert code == 0 and out.startswith("boiling water\n\n1. steam\n   bm25 ")
    assert re.search(r"1\. steam\n   bm25 \d\.\d+ \(1\)\n   \{\"year\": 1999\}\n   Steam Water boils", out)
    assert re.search(r"…\n\n2\. ice\n   bm25 0\.\d+ \(2\)\n   Water freezes at 0 degrees\.\n$", out)


@pytest.mark.parametrize("columns", ["24", "40", "100"])
def test_no_line_is_wider_than_the_terminal_in_any_language(search, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for query in ("water at degrees", "水的沸腾"):
        out = search("--query", query)[1]
        assert max(map(cell_len, out.splitlines())) <= int(columns) and "\x1b" not in out
    assert '{"来源": "百科"}' in out and "…" in out


def test_a_terminal_gets_bold_ids_and_a_file_gets_none(search, monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in search("--query", "iron")[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out = search("--query", "iron")[1]
    assert "\x1b[1m1. iron\x1b[0m" in out and out.count("\x1b") == 2, "none of a document's own"
    out = search("--query", "violet")[1]
    assert "1. [31mred line" in out and out.count("\x1b") == 2 and "\u202e" not in out
    search("--query", "iron", "--output_format", "text", "--output", "o.txt")
    assert "\x1b" not in (tmp_path / "o.txt").read_text()


def test_a_passage_of_a_file_is_shown_with_its_place(capsys, tmp_path):
    (tmp_path / "notes").mkdir()
    text = "# Water\n\nWater boils.\n\n# 首都\n\n北京是中国的首都。\n"
    (tmp_path / "notes" / "水 notes.md").write_text(text, encoding="utf-8")
    build_index(tmp_path / "notes", tmp_path / "index", IndexOptions(passage_tokens=14))
    assert main(["search", "--index", str(tmp_path / "index"), "--query", "中国"]) == 0
    out = capsys.readouterr().out
    assert "\n1. 水 notes.md#2\n" in out
    assert "\n   水 notes.md, characters 23 to 38\n   # 首都 北京是中国的首都。" in out


def test_json_is_an_object_for_each_query(search, index):
    queries = {"a": "boiling water", "b": "水的沸腾", "c": "zzz"}
    with gzip.open("queries.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in queries.items())
    code, out, _ = search("--queries", "queries.jsonl.gz", "--output_format", "json", "--top_k", "2")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [one["query_id"] for one in found] == ["a", "b", "c"] and found[2]["results"] == []
    expected = json.loads(Retriever(index).search("水的沸腾", top_k=2).to_json())
    assert found[1] == {"query_id": "b"} | expected and found[1]["results"][0]["doc_id"] == "茶"
    assert "茶" in out and found[1]["results"][0]["metadata"] == {"来源": "百科"}
    assert json.loads(search("--query", "水的沸腾", "--output_format", "json", "--top_k", "2")[1]) == expected


def test_a_run_of_many_queries_is_read_back(search, tmp_path):
    (tmp_path / "queries.txt").write_text("\ufeffboiling water\n\n水的沸腾\n", encoding="utf-8")
    code, out, _ = search("--queries", "queries.txt", "--output", "run.trec")
    assert (code, out) == (0, "run.trec: 2 queries\n")
    run = read_run("run.trec")
    assert list(run) == ["1", "3"] and list(run["3"]) == ["茶"] and set(run["1"]) == {"steam", "ice"}
    assert (tmp_path / "run.trec").read_text().split()[:6:5] == ["1", "index"]
    code, _, error = search("--queries", "queries.txt", "--output", "run.trec")
    assert code == 2 and "run.trec exists" in error and error.count("\n") == 1
    assert search("--queries", "queries.txt", "--output", "run.trec", "--overwrite", "--top_k", "1")[0] == 0
    assert len(read_run("run.trec")["1"]) == 1
    assert search("--queries", "queries.txt", "--output", "new/run.jsonl")[0] == 0
    assert json.loads((tmp_path / "new" / "run.jsonl").read_text().splitlines()[0])["query_id"] == "1"


def test_a_run_that_fails_leaves_no_file(search, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "with space.md").write_text("water\n")
    (tmp_path / "notes" / "a.md").write_text("iron\n")
    build_index(tmp_path / "notes", tmp_path / "index", IndexOptions())
    (tmp_path / "queries.txt").write_text("iron\nwater\n")
    code, _, error = search("--index", str(tmp_path / "index"), "--queries", "queries.txt", "--output", "run.trec")
    assert code == 2 and error == (
        "error: the document id 'with space.md#1' has spaces, which a TREC run cannot hold; give it another id, "
        "or take JSON for the results of a search.\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "index", "queries.txt"}


def test_a_reranker_orders_what_was_found(search, model):
    code, out, error = search("--query", "degrees", "--reranker", model, "--normalize", "--device", "cpu")
    assert code == 0 and re.search(r"\n1\. \w+\n   reranked 0\.\d+ \(1\), bm25 0\.\d+ \(\d\)\n", out), error


def test_the_best_slice_is_shown(search, model):
    options = ("--reranker", model, "--device", "cpu", "--max_length", "24", "--long_document", "max_slice")
    out = search("--query", "沸腾", "--output_format", "json", *options)[1]
    start, end = json.loads(out)["results"][0]["slice"]
    text = CORPUS[2]["text"]
    shown = "".join(search("--query", "沸腾", *options)[1].split("百科")[1].split("\n")[1].split())
    assert shown.startswith(("…" * (start > 0) + text[start:end])[:20])


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], "--query: is missing; give query or queries"),
        (["--query", "a", "--queries", "q.txt"], "--query: given with queries; give query or queries"),
        (["--queries", "nothing.txt"], "--queries: found no file nothing.txt"),
        (["--queries", "empty.txt"], "empty.txt: found no queries"),
        (["--queries", "bad.jsonl"], "bad.jsonl:1: "),
        (["--query", "a", "--index", "folder"], "folder: no finished index"),
        (["--query", "a", "--stages", "bm25,dense"], "stages: expected some of bm25, each once; found"),
        (["--query", "a", "--output_format", "csv"], "--output_format: expected one of text, json, trec, found csv"),
        (["--query", "a", "--fusion", "q.txt"], "q.txt: expected a file that rag-retrieval fit-fusion wrote"),
        (["--query", "a", "--reranker", "./nothing"], "--reranker: found no folder ./nothing"),
        (["--query", "a", "--output", "folder"], "output: "),
        (["--query", "a", "--output", "q.txt/o.trec"], "q.txt"),
    ],
)
def test_a_mistake_is_one_line(search, tmp_path, options, expected):
    (tmp_path / "folder").mkdir()
    for name, text in (("q.txt", "a"), ("empty.txt", "\n"), ("bad.jsonl", "{}")):
        (tmp_path / name).write_text(text)
    code, out, error = search(*options)
    assert code == 2 and not out
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1


# ---- fit-fusion


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A data folder and its index of words and of random vectors, which only hurt."""
    root = tmp_path_factory.mktemp("both")
    rows = [{"_id": f"{name}-{place}", "text": f"{name} {'x ' * place}"} for name in NAMES for place in range(4)]
    write_lines(root / "data" / "corpus.jsonl", rows)
    write_lines(root / "data" / "queries.jsonl", [{"_id": f"q{name}", "text": f"where is {name}"} for name in NAMES])
    (root / "data" / "qrels").mkdir()
    lines = "".join(f"q{name}\t{name}-0\t1\n" for name in NAMES)
    (root / "data" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    save_by_sentence_transformers(tiny_bert(root / "base"), root / "embedder", "mean")
    options = IndexOptions(embedder=str(root / "embedder"), device="cpu")
    return root / "data", build_index(root / "data", root / "index", options).folder


def test_fit_fusion_writes_into_the_index_what_searches_take(both, capsys, tmp_path):
    data, index = both
    assert Retriever(index, device="cpu").fusion == Fusion()
    command = ["fit-fusion", "--index", str(index), "--data", str(data), "--depth", "10", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "own.json"), "--metric", "recall@1"]) == 0
    assert Retriever(index, device="cpu").fusion == Fusion()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"8 queries +ndcg@10 +taken\n  bm25 +1\.0000 +\*\n  dense +0\.\d{4}\n  reciprocal ranks", out)
    assert f"{index}/fusion.json: bm25" in out
    saved = json.loads((index / "fusion.json").read_text())
    assert saved["weights"] == {"bm25": 1.0, "dense": 0.0}
    assert {"data": "data", "split": "dev", "depth": 10}.items() <= saved["fitted"].items()
    about = {"metric": "ndcg@10", "queries": 8, "chosen": "bm25"}
    assert about.items() <= saved["fitted"]["stages"].items()
    assert Retriever(index, device="cpu").stages == ["bm25"]
    first = (index / "fusion.json").read_bytes()
    assert main(command) == 0 and (index / "fusion.json").read_bytes() == first
    (index / "fusion.json").unlink()


def test_fit_fusion_also_fits_the_weight_of_a_reranker(both, model, capsys, tmp_path):
    """The tiny reranker knows nothing, so that after words, which find everything, it gets no weight."""
    data, index = both
    file = str(tmp_path / "own.json")
    command = ["fit-fusion", "--data", str(data), "--depth", "10", "--device", "cpu", "--output", file]
    assert main([*command, "--index", str(index), "--reranker", model]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n  bm25 +1\.0000 +\*\n  reranked +0\.\d{4}\n  fitted weights +[01]\.\d{4}\nbest", out)
    assert out.endswith(f"{file}: bm25, reranker 0.00\n")
    assert Fusion.read(file) == Fusion({"bm25": 1.0, "dense": 0.0}, 0.0, model_content(model))
    saved = json.loads((tmp_path / "own.json").read_text())["fitted"]
    assert saved["reranker"]["chosen"] == "bm25" and list(saved["reranker"]["values"])[:2] == ["bm25", "reranked"]
    search = ["search", "--index", str(index), "--fusion", file, "--reranker", model, "--device", "cpu"]
    assert main([*search, "--query", "where is apple", "--depth", "10", "--top_k", "1"]) == 0
    assert re.search(r"1\. apple-0\n   combined 1 \(1\), reranked \S+ \(\d+\), bm25 ", capsys.readouterr().out)


def test_an_index_of_one_search_has_a_weight_for_a_reranker(both, model, capsys, tmp_path):
    data = shutil.copytree(both[0], tmp_path / "data")
    with (data / "queries.jsonl").open("a") as queries, (data / "qrels" / "dev.tsv").open("a") as qrels:
        queries.write('{"_id": "nothing", "text": "zzz"}\n')  # which finds no document
        qrels.write("nothing\tapple-0\t1\n")
    build_index(data, tmp_path / "words", IndexOptions())
    options = ["--index", str(tmp_path / "words"), "--device", "cpu"]
    assert main(["fit-fusion", *options, "--data", str(data), "--reranker", model]) == 0
    out = capsys.readouterr().out
    assert out.startswith("9 queries ") and out.endswith("words/fusion.json: reranker 0.00\n")
    assert Fusion.read(tmp_path / "words" / "fusion.json") == Fusion(None, 0.0, model_content(model))
    with Retriever(tmp_path / "words", reranker=model, device="cpu") as retriever:
        assert list(retriever.search("apple")[0].scores) == ["bm25", "reranked", "combined"]


def test_a_fit_that_cannot_be_is_one_line(both, index, capsys, tmp_path):
    data, folder = both
    other = tmp_path / "other"
    write_lines(other / "queries.jsonl", [{"_id": "q", "text": "where"}])
    (other / "qrels").mkdir()
    (other / "qrels" / "dev.tsv").write_text("q\tunknown\t1\n")
    for options, expected in [
        (["--index", index, "--data", str(data)], "its only stage is bm25; a fusion needs two"),
        (["--index", str(folder), "--data", str(other)], "none of the judged documents is in"),
        (["--index", str(folder), "--data", str(data), "--split", "test"], "the splits there: dev"),
        (["--index", str(folder), "--data", str(data), "--metric", "accuracy"], "--metric: found 'accuracy'"),
    ]:
        assert main(["fit-fusion", *options, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


# ---- the page


def test_the_commands_and_the_python_of_the_page_work(both, model, tmp_path, monkeypatch, capsys):
    """With a small index and a tiny model in place of those that it names."""
    data, index = both
    for source, name in ((index, "runs/index"), (data, "example_data/stdlib_beir"), (model, "runs/a/model")):
        shutil.copytree(source, tmp_path / name)
    qrels = tmp_path / "example_data" / "stdlib_beir" / "qrels"
    for split in ("train", "test"):
        shutil.copy(qrels / "dev.tsv", qrels / f"{split}.tsv")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8").partition("## Search\n")[2]
    build_index(PAGE.parent, tmp_path / "runs" / "docs", IndexOptions())
    code, filtered = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, names := {})
    assert len(names["many"]) == 2 and len(names["results"]) == 3
    exec(filtered, names)
    assert len(names["results"]) == 3
    assert all(one.metadata["file"] in ("search.md", "data.md") for one in names["results"])
    commands = re.findall(r"^rag-retrieval (?:search|fit-fusion) .*", page, flags=re.MULTILINE)
    commands += re.findall(r"`(rag-retrieval evaluate --.*?)`", page, flags=re.DOTALL)
    assert len(commands) == 7
    for command in commands:
        assert main([*shlex.split(command)[1:], "--device", "cpu"]) == 0, command
    assert set(read_run("runs/search.trec")) == {f"q{name}" for name in NAMES}
    assert Retriever("runs/index").stages == ["bm25"]


def test_the_page_shows_what_a_fit_prints():
    values = {"bm25": 0.7102, "dense": 0.7127, "reciprocal ranks": 0.7621, WEIGHTS: 0.7699}
    weights = {"bm25": 0.4, "dense": 0.6}
    fit = FusionFit(WEIGHTS, Fusion(weights), "ndcg@10", 1200, values, weights, [weights] * 5)
    assert f"```\n{fit.describe()}\nruns/index/fusion.json: {WEIGHTS}\n```" in PAGE.read_text(encoding="utf-8")
    folds = [{"bm25": 0.35, "dense": 0.65}, weights]
    unsure = FusionFit(WEIGHTS, Fusion(weights), "ndcg@10", 9, values, weights, folds)
    assert "also bm25 0.35, dense 0.65" in unsure.describe()
