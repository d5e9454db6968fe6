"""Texts, tiny folders and vectors of sentence-transformers, for tests of embedding models."""

import json
import shutil
from pathlib import Path

import torch
from tiny_models import CHINESE, ENGLISH, tiny_bert, tiny_llama, tiny_qwen2, tiny_xlm_roberta

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.token_batch import make_batch

TEXTS = [*ENGLISH, *CHINESE, "a", "", " ".join(ENGLISH)]
FAMILIES = {"bert": tiny_bert, "xlm_roberta": tiny_xlm_roberta, "qwen2": tiny_qwen2, "llama": tiny_llama}
PROMPTS = {"query": "query: ", "document": "passage: "}


@torch.no_grad()
def vectors_of(model: EmbeddingModel, texts=TEXTS, kind=None, normalize=True) -> torch.Tensor:
    vectors = model.eval()(make_batch(model.text_encoder.encode(texts, kind))).dense
    return torch.nn.functional.normalize(vectors) if normalize else vectors


def open_elsewhere(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def assert_equal_elsewhere(model: EmbeddingModel, folder, texts=TEXTS) -> None:
    """Vectors of sentence-transformers for queries, documents and texts without a kind."""
    other = open_elsewhere(folder)
    for kind, encode in (("query", other.encode_query), ("document", other.encode_document), (None, other.encode)):
        difference = vectors_of(model, texts, kind, model.settings.normalize) - torch.from_numpy(encode(texts))
        assert difference.abs().max() < (1e-6 if model.settings.normalize else 1e-5)


LEGACY_POOLING = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def save_by_sentence_transformers(
    base: str, folder: Path, pooling: str, prompts=None, dense=(), legacy=False, **options
) -> None:
    """What SentenceTransformer.save writes; with `legacy` as it did before version 5.4."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    transformer = parts.Transformer(base, max_seq_length=24)
    modules = [transformer, parts.Pooling(transformer.get_embedding_dimension(), pooling, **options), *dense]
    SentenceTransformer(modules=[*modules, parts.Normalize()], prompts=prompts, device="cpu").save(str(folder))
    if legacy:
        file = folder / "1_Pooling" / "config.json"
        values = {key: name == pooling for name, key in LEGACY_POOLING.items()}
        file.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_max_tokens": False} | values))
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
        entries = json.loads((folder / "modules.json").read_text())
        for entry in entries:
            entry["type"] = "sentence_transformers.models." + entry["type"].rpartition(".")[2]
        (folder / "modules.json").write_text(json.dumps(entries))


def copy_as(folder: str, name: str, root: Path) -> str:
    return shutil.copytree(folder, root / name).as_posix()
