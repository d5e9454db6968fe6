"""A folder means the same everywhere: every entry that opens a model gives a pair the same score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_samples import exported
from tiny_models import ENGLISH, HIDDEN, qwen2_tokenizer, save_tiny, tiny_bert
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen3Config

from rag_retrieval import EvaluationConfig, MiningConfig, Reranker, evaluate_reranker, load_reranker

pytest.importorskip("bm25s")

DOCUMENTS = ["Paris is in France.", ENGLISH[2], "what is a river? water."]
QUERY = "where is Paris?"
OPTIONS = {"device": "cpu", "long_document": "truncate"}


def tiny_decoder(folder: Path, config_class, labels: int = 0) -> Path:
    tokenizer = qwen2_tokenizer()
    tokenizer.add_tokens([AddedToken(text, single_word=True) for text in ("yes", "no")])
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, head_dim=16, intermediate_size=2 * HIDDEN, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    save_tiny(folder, config, tokenizer, head_labels=labels)
    return folder


def encoder(folder: Path) -> Path:
    return Path(tiny_bert(folder, head_labels=1))


def by_sentence_transformers(folder: Path) -> Path:
    from sentence_transformers import CrossEncoder

    prompts = {"prompts": {"search": "a list of tuples: "}, "default_prompt_name": "search"}
    model = CrossEncoder(str(encoder(folder / "base")), device="cpu", max_length=24, **prompts)
    model.save_pretrained(str(folder / "st"))
    return folder / "st"


def scalar_decoder(folder: Path) -> Path:
    formats = dict(query_format="Q: {}", document_format="D: {}", seq="\n", special_token=" ?")
    base = tiny_decoder(folder / "base", Qwen2Config, labels=1)
    load_reranker(base, device="cpu", **formats).save_pretrained(folder / "saved")
    return folder / "saved"


def known_prompt(folder: Path) -> Path:
    tiny_decoder(folder, Qwen2Config)
    file = folder / "config.json"
    named = {"_name_or_path": "mixedbread-ai/mxbai-rerank-base-v2"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folder


def chat_template(folder: Path) -> Path:
    tiny_decoder(folder, Qwen3Config, labels=1)
    query, document = (
        f"{{{{ (messages | selectattr('role', 'eq', '{role}') | first).content }}}}" for role in ("query", "document")
    )
    template = f"<|im_start|>Is it so?\nQ: {query}\nD: {document}<|im_end|>\nanswer:"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def onnx(folder: Path) -> Path:
    return exported(encoder(folder / "base"), folder / "onnx")


def encoder_with_formats(folder: Path) -> Path:
    formats = dict(query_format="how? {} !", document_format="a file: {}")
    load_reranker(encoder(folder / "base"), device="cpu", **formats).save_pretrained(folder / "saved")
    return folder / "saved"


def onnx_with_formats(folder: Path) -> Path:
    return exported(encoder_with_formats(folder), folder / "onnx")


KINDS = (
    encoder, encoder_with_formats, onnx_with_formats, by_sentence_transformers, scalar_decoder, known_prompt,
    chat_template, onnx,
)  # fmt: skip


# ---- the entries, each from a folder to the scores of the documents -------------------------------------------


def of_reranker(folder: Path, tmp_path: Path) -> list[float]:
    return Reranker(folder, device="cpu").compute_score([(QUERY, text) for text in DOCUMENTS]).tolist()


def of_rerank(folder: Path, tmp_path: Path) -> list[float]:
    results = Reranker(folder, device="cpu").rerank(QUERY, DOCUMENTS, long_document="truncate")
    return [result.score for result in sorted(results, key=lambda result: result.document_index)]


def of_evaluate(folder: Path, tmp_path: Path) -> list[float]:
    record = {"query": QUERY, "hits": [{"content": text, "label": float(not i)} for i, text in enumerate(DOCUMENTS)]}
    data = tmp_path / "ranking.jsonl"
    data.write_text(json.dumps(record) + "\n")
    config = EvaluationConfig(model=str(folder), data=str(data), output_dir=str(tmp_path / "evaluation"), **OPTIONS)
    found = evaluate_reranker(config)
    (scores,) = found.after.run.values()
    return [next(score for document, score in scores.items() if found.data.documents[document] == text)
            for text in DOCUMENTS]  # fmt: skip


def of_mine(folder: Path, tmp_path: Path) -> list[float]:
    from mining_samples import corpus_of

    from rag_retrieval.mining.miner import open_reranker, rerank
    from rag_retrieval.mining.queries import Query

    config = MiningConfig(data="d.jsonl", output="o.jsonl", reranker=str(folder), **OPTIONS)
    query = Query(QUERY, np.array([2]), [1.0])
    corpus = corpus_of(tmp_path, DOCUMENTS)
    return np.concatenate(rerank(open_reranker(config, "cpu"), query, np.array([0, 1]), corpus, config)).tolist()


def of_distill(folder: Path, tmp_path: Path) -> list[float]:
    from rag_retrieval.distill.config import DistillConfig
    from rag_retrieval.distill.run import load_teachers, mean_logits

    config = DistillConfig(dataset="d.jsonl", output="o.jsonl", teachers=str(folder))
    teachers = load_teachers(config, torch.device("cpu"))
    return mean_logits(teachers, [(QUERY, text) for text in DOCUMENTS], 8).tolist()


def of_serve(folder: Path, tmp_path: Path) -> list[float]:
    from rag_retrieval.infer.backend import open_backend
    from rag_retrieval.serve.config import ServeConfig

    config = ServeConfig(model=str(folder), **OPTIONS)
    backend = open_backend(config.model, config.model_options())
    encoded = Reranker.from_backend(backend).passage_encoder(None, config.long_document)
    pairs = [document.pairs[0] for document in encoded.encode([(QUERY, text) for text in DOCUMENTS])]
    return backend.score(pairs, 8).tolist()


def of_langchain(folder: Path, tmp_path: Path) -> list[float]:
    pytest.importorskip("langchain_core")
    from langchain_core.documents import Document

    from rag_retrieval.integrations.langchain import RerankerCompressor

    compressor = RerankerCompressor(model=str(folder), long_document="truncate")
    found = compressor.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY)
    return in_order({document.page_content: document.metadata["relevance_score"] for document in found})


def of_llama_index(folder: Path, tmp_path: Path) -> list[float]:
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, TextNode

    from rag_retrieval.integrations.llama_index import RerankerPostprocessor

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    postprocessor = RerankerPostprocessor(model=str(folder), long_document="truncate")
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    return in_order({node.node.get_content(): node.score for node in found})


def of_haystack(folder: Path, tmp_path: Path) -> list[float]:
    pytest.importorskip("haystack")
    from haystack import Document

    from rag_retrieval.integrations.haystack import RerankerRanker

    ranker = RerankerRanker(str(folder), long_document="truncate")
    found = ranker.run(QUERY, [Document(content=text) for text in DOCUMENTS])["documents"]
    return in_order({document.content: document.score for document in found})


def of_mteb(folder: Path, tmp_path: Path) -> list[float]:
    pytest.importorskip("mteb")
    from rag_retrieval.integrations.mteb import RerankerCrossEncoder

    task = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
    inputs = [{"text": [QUERY] * len(DOCUMENTS)}], [{"text": DOCUMENTS}]  # as MTEB's loaders give them
    return RerankerCrossEncoder(str(folder)).predict(*inputs, **task).tolist()


def of_load_reranker(folder: Path, tmp_path: Path) -> list[float]:
    return load_reranker(folder, device="cpu").compute_score([(QUERY, text) for text in DOCUMENTS]).tolist()


def of_export(folder: Path, tmp_path: Path) -> list[float]:
    """What the exported model is compared with."""
    from rag_retrieval.export.config import ExportConfig
    from rag_retrieval.export.run import own_results
    from rag_retrieval.export.source import open_source
    from rag_retrieval.export.verify import CheckData

    source = open_source(ExportConfig(model=str(folder), output="unused"))
    encoded = source.encode([(QUERY, text) for text in DOCUMENTS])
    check = CheckData(source, encoded, len(DOCUMENTS), data=None, graded=None)
    return own_results(str(folder), source, check).scores["scores"].tolist()


ENTRIES = (of_rerank, of_evaluate, of_mine, of_distill, of_serve, of_langchain, of_llama_index, of_haystack,
           of_mteb)  # fmt: skip
OF_WEIGHTS = (of_load_reranker, of_export)  # which an exported folder does not have


def in_order(scores: dict[str, float]) -> list[float]:
    return [scores[text] for text in DOCUMENTS]


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_gives_the_same_scores(kind, tmp_path):
    folder = kind(tmp_path / "model")
    expected = of_reranker(folder, tmp_path)
    assert np.ptp(expected) > 1e-3
    for entry in ENTRIES + (() if kind in (onnx, onnx_with_formats) else OF_WEIGHTS):
        scratch = tmp_path / entry.__name__
        scratch.mkdir()
        assert entry(folder, scratch) == pytest.approx(expected, abs=1e-5), entry.__name__


@pytest.mark.parametrize("entry", [of_reranker, *ENTRIES, *OF_WEIGHTS])
def test_every_entry_refuses_a_model_without_a_trained_head(entry, tmp_path):
    folder = Path(tiny_bert(tmp_path / "base"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": None}))  # whose files do not say it
    with pytest.raises(ValueError, match="no trained head"):
        entry(folder, tmp_path)
