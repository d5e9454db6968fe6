"""Vectors of a corpus in files of several processes, and the options of FlagEmbedding's and MindSpore's commands."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from beir_samples import write, write_lines, write_toy

from rag_retrieval import Embedder, RetrievalEvaluationConfig
from rag_retrieval.cli import main
from rag_retrieval.core.config_reader import load_config
from rag_retrieval.data.beir import read_run
from rag_retrieval.evaluate.other_commands import ALIASES, INSTRUCTION, TRANSLATIONS
from rag_retrieval.evaluate.vector_files import rank_files, read_vectors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


def corpus_of(toy):
    import json

    rows = [json.loads(line) for line in (toy / "corpus.jsonl").read_text().splitlines()]
    return {row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows}


def save_parts(folder, vectors, count):
    folder.mkdir()
    for rank, part in enumerate(np.array_split(vectors, count)):
        np.save(folder / f"corpus_embeddings_rank{rank}.npy", part)


def test_rank_10_comes_after_rank_9_and_the_vectors_are_used_as_they_are(toy, base_folders, tmp_path, capsys):
    corpus = corpus_of(toy)
    vectors = Embedder(base_folders["bert"], device="cpu").encode_documents(list(corpus.values()))
    save_parts(tmp_path / "kept", vectors[::-1].copy(), 12)  # the order of the files, not what a new encoding gives
    assert [file.name for file in rank_files(tmp_path / "kept")][9:] == [
        f"corpus_embeddings_rank{rank}.npy" for rank in (9, 10, 11)
    ]
    options = ["--data", str(toy), "--corpus_embeddings", str(tmp_path / "kept"), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", "--encoder", base_folders["bert"], *options, "--k", "100", "--index_factory", "Flat"]) == 0
    (run,) = (tmp_path / "out/runs").iterdir()
    query = Embedder(base_folders["bert"], device="cpu").encode_queries("where is window 8")
    wanted = dict(zip(corpus, (vectors[::-1] @ query).tolist(), strict=True))
    assert read_run(run)["q8"] == pytest.approx(wanted, abs=1e-5)


def test_missing_files_are_written_once_and_taken_the_second_time(toy, base_folders, tmp_path, monkeypatch):
    arguments = ["evaluate", "--encoder", base_folders["bert"], "--data", str(toy), "--corpus_embeddings"]
    arguments += [str(tmp_path / "new"), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    (file,) = (tmp_path / "new").iterdir()
    expected = Embedder(base_folders["bert"], device="cpu").encode_documents(list(corpus_of(toy).values()))
    assert file.name == "corpus_embeddings_rank0.npy" and np.abs(np.load(file) - expected).max() < 1e-6
    np.save(file, np.zeros_like(expected))
    assert main([*arguments, "--report"]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert re.search(r'"seconds":{"[^"]+":{"encode":[\d.e-]+,"dense":[\d.e-]+}}', page)
    (run,) = (tmp_path / "out/runs").iterdir()
    assert set(read_run(run)["q8"].values()) == {0.0}


def test_files_that_do_not_fit_are_refused(tmp_path):
    vectors = np.ones((24, 8), np.float32)
    save_parts(tmp_path / "v", vectors, 3)
    assert sum(map(len, read_vectors(tmp_path / "v", 24, 8))) == 24
    with pytest.raises(ValueError, match="found 24 vectors in 3 files for 25 documents"):
        read_vectors(tmp_path / "v", 25, 8)
    with pytest.raises(ValueError, match="rank0.npy: the vectors have 8 numbers, and those of the model 9"):
        read_vectors(tmp_path / "v", 24, 9)
    second = tmp_path / "v" / "corpus_embeddings_rank1.npy"
    np.save(second, np.ones((8, 7), np.float32))
    with pytest.raises(ValueError, match="rank1.npy: the vectors have 7 numbers"):
        read_vectors(tmp_path / "v", 24, 8)
    np.save(second, np.ones((8, 8), np.float16))
    with pytest.raises(ValueError, match="rank1.npy: the numbers are float16, and float32 in corpus_embeddings_rank0"):
        read_vectors(tmp_path / "v", 24, 8)
    np.save(second, np.ones((8, 8), np.int64))
    with pytest.raises(ValueError, match="rank1.npy: expected float vectors"):
        read_vectors(tmp_path / "v", 24, 8)
    second.write_bytes(b"")
    with pytest.raises(ValueError, match="rank1.npy: not an array that numpy.save wrote"):
        read_vectors(tmp_path / "v", 24, 8)
    second.unlink()
    with pytest.raises(ValueError, match="found no corpus_embeddings_rank1.npy, but one of rank 2"):
        read_vectors(tmp_path / "v", 24, 8)


@pytest.mark.slow
def test_two_processes_write_a_file_each_and_find_what_one_finds(toy, base_folders, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for count in ("1", "2"):
        options = ["--encoder", base_folders["bert"], "--data", str(toy), "--output_format", "dict", "--k", "100"]
        options += [
            "--corpus_embeddings",
            str(tmp_path / f"kept{count}"),
            "--output_dir",
            str(tmp_path / f"out{count}"),
        ]
        done = subprocess.run(
            [*launch, count, "-m", "rag_retrieval.cli", "evaluate", *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("'MRR@10'") == 1
    files = rank_files(tmp_path / "kept2")
    assert [len(np.load(file)) for file in files] == [36, 36]
    together = np.concatenate([np.load(file) for file in files])
    assert np.abs(together - np.load(tmp_path / "kept1" / "corpus_embeddings_rank0.npy")).max() < 1e-5


# ---- names of other commands


def flag_embedding(ranked, relevant, cutoffs=(1, 10, 100)):
    """MRR and recall as FlagEmbedding's script defines them, of ranked documents and sets of relevant ones by query."""
    found = {}
    for k in cutoffs:
        reciprocals, shares = [], []
        for query, documents in ranked.items():
            ranks = [rank for rank, document in enumerate(documents[:k], 1) if document in relevant[query]]
            reciprocals.append(1 / ranks[0] if ranks else 0)
            shares.append(len(ranks) / len(relevant[query]))
        found |= {f"MRR@{k}": sum(reciprocals) / len(ranked), f"Recall@{k}": sum(shares) / len(ranked)}
    return found


def test_the_dict_has_what_flag_embedding_prints(tmp_path, capsys):
    root = tmp_path / "data"
    documents = [f"d{place}" for place in range(150)]
    write_lines(root / "corpus.jsonl", [{"_id": id_, "text": id_} for id_ in documents])
    write_lines(root / "queries.jsonl", [{"_id": f"q{place}", "text": f"query {place}"} for place in range(6)])
    draw = np.random.default_rng(0)
    ranked = {f"q{place}": draw.permutation(documents)[:120].tolist() for place in range(6)}
    relevant = {query: set(draw.choice(documents, 1 + place).tolist()) for place, query in enumerate(ranked)}
    write(root / "qrels/test.tsv", "".join(f"{q}\t{d}\t1\n" for q, own in relevant.items() for d in own))
    write(root / "run.trec", "".join(f"{q} Q0 {d} 0 {-r} x\n" for q, own in ranked.items() for r, d in enumerate(own)))
    options = ["--data", str(root), "--k", "100", "--output_format", "dict", "--output_dir", str(tmp_path / "o")]
    assert main(["evaluate", "--encoder", str(root / "run.trec"), *options]) == 0
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed == pytest.approx(flag_embedding(ranked, relevant))
    (root / "same.trec").write_text((root / "run.trec").read_text())
    both = f"{root}/run.trec,{root}/same.trec"
    assert main(["evaluate", "--encoder", both, *options[:-1], str(tmp_path / "p")]) == 0
    assert ast.literal_eval(capsys.readouterr().out) == {"run.trec": printed, "same.trec": printed}


def test_a_command_of_flag_embedding_means_our_keys(toy, base_folders, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = f"--encoder {base_folders['bert']} --fp16 --add_instruction --k 100 --index_factory Flat --data toy"
    command += " --max_query_length 32 --max_passage_length 128 --batch_size 256 --corpus_embeddings kept"
    config = load_config(RetrievalEvaluationConfig, None, command.split())
    assert config.retriever == (base_folders["bert"],) and config.dtype == "fp16" and config.depth == 100
    assert (config.query_max_length, config.max_length, config.batch_size) == (32, 128, 256)
    assert config.faiss_index == "Flat" and config.prompts == {"query": INSTRUCTION} and config.ignored is None
    without = load_config(RetrievalEvaluationConfig, None, [*command.split(), "--add_instruction", "false"])
    assert without.prompts == {"query": ""}
    for wrong in (["--fp16", "perhaps"], ["--fp16", "--dtype", "bf16"], ["--index_factory", "IVF4,Flat"]):
        with pytest.raises(ValueError, match="perhaps|keep one of the two|searched exactly"):
            load_config(RetrievalEvaluationConfig, None, [*command.split(), *wrong])


def test_half_precision_and_the_instruction_change_the_vectors(toy, base_folders, tmp_path):
    options = ["--encoder", base_folders["bert"], "--data", str(toy), "--fp16", "--add_instruction"]
    assert main(["evaluate", *options, "--output_dir", str(tmp_path / "o")]) == 0
    (run,) = (tmp_path / "o/runs").iterdir()
    embedder = Embedder(base_folders["bert"], dtype="fp16", device="cpu")
    query = embedder.encode("where is window 8", INSTRUCTION)
    document = embedder.encode_documents(corpus_of(toy)["d8-1"])
    assert read_run(run)["q8"]["d8-1"] == pytest.approx(float(query @ document), abs=1e-3)


def test_the_page_has_every_name_of_other_commands():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `--(\w+)` \| `--(\w+)[^|]*\|", page, flags=re.MULTILINE))
    assert {name: table.get(name) for name in ALIASES} == ALIASES
    assert {name: table.get(name) for name in TRANSLATIONS} == {
        name: next(iter(meaning(True))) for name, meaning in TRANSLATIONS.items()
    }
