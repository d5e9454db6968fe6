"""MTEB's own package on tasks from local texts: its figures are those of our measures on our own rankings."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb  # noqa: E402
from beir_samples import write_toy  # noqa: E402
from embedder_samples import PROMPTS, save_by_sentence_transformers  # noqa: E402
from integrations.mteb_tasks import (  # noqa: E402
    DOCUMENTS,
    LISTED,
    PAIRS,
    QRELS,
    QUERIES,
    LocalReranking,
    LocalRetrieval,
    LocalSts,
)
from mining_samples import write_beir  # noqa: E402
from mteb.models import CrossEncoderProtocol, EncoderProtocol, SearchProtocol  # noqa: E402
from mteb.types import PromptType  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from tiny_models import bring_code, tiny_bert  # noqa: E402

from rag_retrieval import Embedder, Reranker, cli  # noqa: E402
from rag_retrieval.integrations.mteb import EmbedderEncoder, RerankerCrossEncoder, RetrieverSearch  # noqa: E402
from rag_retrieval.metrics import run_metrics  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402
from rag_retrieval.retrieval.bm25 import bm25_run  # noqa: E402
from rag_retrieval.retrieval.config import IndexOptions  # noqa: E402

TASK_PROMPTS = PROMPTS | {"LocalRetrieval-query": "find: ", "STS": "similar: "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Of an embedding model with prompts for queries, documents and two tasks."""
    root = tmp_path_factory.mktemp("mteb")
    save_by_sentence_transformers(tiny_bert(root / "bert"), root / "run" / "model", "mean", prompts=TASK_PROMPTS)
    return str(root / "run" / "model")


@pytest.fixture(scope="module")
def encoder(folder) -> EmbedderEncoder:
    return EmbedderEncoder(Embedder(folder, device="cpu"))


def scores_of(model, task) -> dict:
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, encode_kwargs={"batch_size": 4})
    (scores,) = found.task_results[0].scores["test"]
    return scores


def own_run(embedder: Embedder, query_prompt=None, document_prompt=None, documents=DOCUMENTS) -> dict:
    queries = embedder.encode(list(QUERIES.values()), query_prompt, kind="query")
    vectors = embedder.encode(list(documents.values()), document_prompt, kind="document")
    scores = embedder.similarity(queries, vectors).tolist()
    return {query: dict(zip(documents, row, strict=True)) for query, row in zip(QUERIES, scores, strict=True)}


def listed(run: dict) -> dict:
    return {query: {document: scores[document] for document in LISTED[query]} for query, scores in run.items()}


def assert_equal_to_ours(scores: dict, run: dict) -> None:
    own = run_metrics(QRELS, run, ["ndcg@10", "mrr@10", "recall@10", "recall@5"])
    assert 0.1 < own["ndcg@10"] < 0.9, "random vectors"
    for name, value in own.items():
        assert scores[name.replace("@", "_at_")] == pytest.approx(value, abs=5.1e-6), "MTEB gives five digits"


def test_retrieval_has_our_figures_with_the_models_prompts(encoder, caplog):
    caplog.set_level(logging.INFO, "rag_retrieval")
    scores = scores_of(encoder, LocalRetrieval())
    assert_equal_to_ours(scores, own_run(encoder.embedder, "find: ", "passage: "))
    assert 'LocalRetrieval, query: "find: " before each' in caplog.text
    assert caplog.text.count("before each") == 2


def test_given_instructions_stand_in_place_of_all_prompts(encoder):
    given = EmbedderEncoder(encoder.embedder, query_instruction="查询：", document_instruction="")
    assert_equal_to_ours(scores_of(given, LocalRetrieval()), own_run(encoder.embedder, "查询：", ""))
    assert given.mteb_model_meta.revision != encoder.mteb_model_meta.revision


def test_reranking_has_our_figures_by_vectors_and_by_a_reranker(encoder, model_folders):
    assert_equal_to_ours(scores_of(encoder, LocalReranking()), listed(own_run(encoder.embedder)))
    reranker = Reranker(model_folders["bert"], device="cpu")
    run = {}
    for query, documents in LISTED.items():
        scores = reranker.compute_score([(QUERIES[query], DOCUMENTS[each]) for each in documents])
        run[query] = dict(zip(documents, scores.tolist(), strict=True))
    assert_equal_to_ours(scores_of(RerankerCrossEncoder(reranker), LocalReranking()), run)


def test_the_likeness_of_pairs_has_spearmans_coefficient_of_our_vectors(encoder):
    scores = scores_of(encoder, LocalSts())
    first, second, labels = zip(*PAIRS, strict=True)
    left, right = (encoder.embedder.encode(list(each), "similar: ") for each in (first, second))
    assert scores["spearman"] == pytest.approx(spearmanr((left * right).sum(axis=1), labels).statistic, abs=1e-9)
    assert scores["cosine_spearman"] == pytest.approx(scores["spearman"], abs=1e-9)


def test_a_retriever_searches_each_corpus_by_vectors_words_or_both(folder, encoder):
    options = {"embedder": folder, "device": "cpu", "vector_precision": "float32"}
    dense = RetrieverSearch(IndexOptions(bm25=False, **options | {"prompts": {"query": "find: "}}))
    assert_equal_to_ours(scores_of(dense, LocalRetrieval()), own_run(encoder.embedder, "find: ", "passage: "))
    words = RetrieverSearch(IndexOptions())
    found, _ = bm25_run(DOCUMENTS, QUERIES, None, 100)
    assert scores_of(words, LocalRetrieval())["ndcg_at_10"] == pytest.approx(
        run_metrics(QRELS, found, ["ndcg@10"])["ndcg@10"], abs=5.1e-6
    )
    both = RetrieverSearch(IndexOptions(**options))
    assert scores_of(both, LocalRetrieval())["ndcg_at_10"] > scores_of(dense, LocalRetrieval())["ndcg_at_10"]
    names = [model.mteb_model_meta.name for model in (dense, words, both)]
    assert names == ["local/run", "local/bm25", "local/bm25+run"]
    with pytest.raises(ValueError, match="LocalReranking lists the documents of each query"):
        scores_of(dense, LocalReranking())


def test_a_retriever_reranks_its_first_documents_and_gives_no_others(folder, encoder, model_folders):
    reranker = Reranker(model_folders["bert"], device="cpu")
    search = RetrieverSearch(IndexOptions(embedder=folder, device="cpu", bm25=False), reranker, depth=6)
    run = {}
    for query, scores in own_run(encoder.embedder).items():
        best = sorted(scores, key=scores.get, reverse=True)[:6]
        found = reranker.compute_score([(QUERIES[query], DOCUMENTS[document]) for document in best])
        run[query] = dict(zip(best, found.tolist(), strict=True))
    assert_equal_to_ours(scores_of(search, LocalRetrieval()), run)


def test_a_retriever_runs_code_of_a_model_where_it_is_trusted(tmp_path):
    own = bring_code(tiny_bert(tmp_path / "bert"), tmp_path / "own")
    options = IndexOptions(embedder=own, trust_remote_code=True, pooling="mean", bm25=False, device="cpu")
    assert 0 < scores_of(RetrieverSearch(options), LocalRetrieval())["ndcg_at_10"] < 1


def test_the_adapters_are_what_mteb_asks_for(encoder, model_folders):
    assert isinstance(encoder, EncoderProtocol) and not isinstance(encoder, SearchProtocol)
    assert isinstance(RerankerCrossEncoder(model_folders["bert"]), CrossEncoderProtocol)
    search = RetrieverSearch(IndexOptions())
    assert isinstance(search, SearchProtocol) and not isinstance(search, (EncoderProtocol, CrossEncoderProtocol))
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.max_tokens) == ("local/run", 32, 24)
    kinds = [PromptType.query, PromptType.document, None]
    assert [encoder.prompt_for(LocalRetrieval.metadata, kind) for kind in kinds] == ["find: ", "passage: ", ""]


def test_the_revision_changes_with_everything_that_decides_on_vectors(folder, tmp_path):
    options = [{}, {"max_length": 20}, {"pooling": "cls"}, {"prompts": {"query": "q: "}}, {"precision": "bf16"}]
    found = [Embedder(folder, device="cpu", **each).backend.fingerprint() for each in options]
    same = {"device": "cpu", "pooling": "mean", "prompts": TASK_PROMPTS, "max_length": 24}
    found.append(Embedder(tiny_bert(tmp_path / "other", seed=1), **same).backend.fingerprint())
    assert len(set(found)) == len(found) and found[0] == Embedder(folder, device="cpu").backend.fingerprint()


# ---- the command


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["mteb", *map(str, arguments)])
    return code, *capsys.readouterr()


OWN = "integrations.mteb_tasks:LocalRetrieval,integrations.mteb_tasks:LocalSts"


def test_the_command_writes_mtebs_files_and_does_nothing_twice(folder, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "rag_retrieval")
    options = ["--model", folder, "--tasks", OWN, "--split", "test", "--output_folder", tmp_path, "--device", "cpu"]
    code, printed, _ = run(capsys, *options)
    (file,) = tmp_path.rglob("LocalRetrieval.json")
    found = json.loads(file.read_text())["scores"]["test"][0]
    assert code == 0 and f"LocalRetrieval test default: ndcg_at_10 {found['main_score']:.5f}\n" in printed
    assert (file.with_name("LocalSts.json").is_file(), file.parent.parent.name) == (True, "local__run")
    assert str(file.parent) in printed
    written, encoded = file.stat().st_mtime_ns, caplog.text.count("before each")
    assert run(capsys, *options)[:2] == (0, printed)
    assert (file.stat().st_mtime_ns, caplog.text.count("before each")) == (written, encoded)


def test_paddlenlps_options_run_and_one_line_says_what_has_no_effect(folder, tmp_path, capsys, caplog):
    options = f"--base_model_name_or_path {folder} --task_name integrations.mteb_tasks:LocalRetrieval --task_split test"
    options += " --pooling_method cls --max_seq_length 20 --eval_batch_size 3 --dtype float32 --padding_side left"
    options += f" --pad_token eos_token --add_bos_token 0 --add_eos_token 1 --output_folder {tmp_path}"
    predictions = tmp_path / "predictions"
    texts = ["--query_instruction", "Q:\\n", "--document_instruction", "", "--prediction_folder", str(predictions)]
    code, _, err = run(capsys, *options.split(), *texts)
    (ignored,) = [line for line in (err + caplog.text).splitlines() if "ignored in this run" in line][:1]
    assert code == 0 and "pad_token, padding_side, add_bos_token, add_eos_token" in ignored
    (file,) = predictions.glob("*.json")
    found = json.loads(file.read_text())["default"]["test"]
    embedder = Embedder(folder, device="cpu", pooling="cls", max_length=20)
    own = own_run(embedder, "Q:\n", "")
    for query, scores in found.items():
        assert scores == pytest.approx(own[query], abs=1e-6)


def test_a_beir_folder_is_a_task_without_a_hub(folder, tmp_path, capsys):
    qrels = [(query, document, grade) for query, grades in QRELS.items() for document, grade in grades.items()]
    documents = DOCUMENTS | {"q1": QUERIES["q1"]}  # which is the query itself
    queries = QUERIES | {"q99": "nothing is relevant for this"}
    data = write_beir(tmp_path / "data", documents, queries, [*qrels, ("q99", "d9", 0)])
    options = ["--model", folder, "--tasks", data, "--split", "train", "--output_folder", tmp_path / "out"]
    code, printed, _ = run(capsys, *options)
    ranked = own_run(Embedder(folder, device="cpu"), documents=documents)
    del ranked["q1"]["q1"]
    own = run_metrics(QRELS, ranked, ["ndcg@10"])["ndcg@10"]
    assert code == 0 and float(printed.split("ndcg_at_10 ")[1].split()[0]) == pytest.approx(own, abs=5.1e-6)
    corpus = data / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("Paris", "Lyon"))
    changed = run(capsys, *options)[1]
    assert changed.splitlines()[0] != printed.splitlines()[0], "other data are measured again"


@pytest.mark.parametrize(
    "options, words",
    [
        ("--tasks SciFact", "--model: is missing"),
        ("--tasks SciFact --candidates fused --reranker RERANKER", "--model: is missing"),
        ("--model MODEL --tasks SciFactt", "tasks: .*SciFact"),
        ("--model MODEL --tasks integrations.mteb_tasks:Nothing", "tasks .*Nothing.* cannot be imported"),
        ("--model MODEL --tasks integrations.mteb_tasks:LocalSts --split dev", "split: LocalSts is measured on test"),
        ("--reranker RERANKER --tasks integrations.mteb_tasks:LocalSts", "LocalSts is no retrieval task"),
        ("--reranker RERANKER --tasks integrations.mteb_tasks:LocalRetrieval", "top_ranked"),
    ],
)
def test_a_mistake_is_one_clear_error(options, words, folder, model_folders, tmp_path, capsys):
    options = options.replace("MODEL", folder).replace("RERANKER", model_folders["bert"]).split()
    code, _, err = run(capsys, *options, "--output_folder", tmp_path)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and re.search(words, line)


def test_a_reranker_alone_runs_from_the_command(model_folders, tmp_path, capsys):
    options = ["--tasks", "integrations.mteb_tasks:LocalReranking", "--output_folder", tmp_path, "--max_length", "64"]
    code, printed, _ = run(capsys, "--reranker", model_folders["bert"], *options)
    assert code == 0 and np.isfinite(float(printed.split("ndcg_at_10 ")[1].split()[0]))


PIPELINES = ("--candidates bm25", "--candidates bm25 --reranker B --depth 5", "--model A --reranker B",
             "--model A --candidates fused --query_instruction q:")  # fmt: skip


@pytest.mark.parametrize("options", PIPELINES)
def test_a_pipeline_runs_from_the_command(options, folder, model_folders, tmp_path, capsys):
    options = options.replace("A", folder).replace("B", model_folders["bert"]).split()
    code, printed, _ = run(
        capsys, *options, "--tasks", "integrations.mteb_tasks:LocalRetrieval", "--output_folder", tmp_path
    )
    assert code == 0 and 0 < float(printed.split("ndcg_at_10 ")[1].split()[0]) < 1


PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
COMMANDS = re.findall(r"^rag-retrieval mteb (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command, folder, model_folders, tmp_path, capsys):
    """On local texts in place of those that a hub has."""
    write_toy(tmp_path / "toy")
    local = {"SciFact": "integrations.mteb_tasks:LocalRetrieval", "STSBenchmark": "integrations.mteb_tasks:LocalSts"}
    local |= {"AskUbuntuDupQuestions": "integrations.mteb_tasks:LocalReranking", "runs/b/model": model_folders["bert"]}
    local |= {"example_data/stdlib_beir": str(tmp_path / "toy"), "runs/a/model": folder}
    arguments = re.sub("|".join(map(re.escape, local)), lambda found: local[found[0]], command).split()
    code, printed, _ = run(capsys, *arguments, "--output_folder", tmp_path / "out")
    assert code == 0 and len(list((tmp_path / "out").rglob("*/model_meta.json"))) == 1
    assert len(printed.splitlines()) == 1 + len(command.split("--tasks ")[1].split()[0].split(","))


def test_a_reranker_by_token_vectors_is_said_to_be_one(model_folders, base_folders, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders["bert"], representations=["multi_vector"], max_length=24)
    model.save_pretrained(tmp_path / "colbert")
    folders = {"late-interaction": tmp_path / "colbert", "cross-encoder": model_folders["bert"]}
    for kind, folder in folders.items():
        assert RerankerCrossEncoder(folder).mteb_model_meta.model_type == [kind]


@pytest.mark.parametrize("kind", ["lexical", "multi_vector"])
def test_the_command_searches_by_lexical_weights_and_token_vectors(kind, base_folders, tmp_path, capsys):
    model = EmbeddingModel.from_pretrained(base_folders["bert"], representations=["dense", "lexical", "multi_vector"])
    model.save_pretrained(tmp_path / "all" / "model")
    options = ("--model", tmp_path / "all" / "model", "--tasks", "integrations.mteb_tasks:LocalRetrieval")
    code, printed, _ = run(capsys, *options, "--candidates", kind, "--output_folder", tmp_path / kind)
    embedder = Embedder(tmp_path / "all" / "model", device="cpu")
    pairs = [(query, document) for query in QUERIES.values() for document in DOCUMENTS.values()]
    scores = iter(getattr(embedder.compute_score(pairs), kind).tolist())
    scored = {query: {document: next(scores) for document in DOCUMENTS} for query in QUERIES}
    # without a common token a document is not found
    ranked = {query: {document: score for document, score in of.items() if score} for query, of in scored.items()}
    own = run_metrics(QRELS, ranked, ["ndcg@10"])["ndcg@10"]
    assert code == 0 and float(printed.split("ndcg_at_10 ")[1].split()[0]) == pytest.approx(own, abs=5.1e-6)
