"""How a server is started with a model: rag-retrieval, text-embeddings-inference and vLLM, where they support it.

What the other two support is what they document, and what they read of a folder (text-embeddings-inference 1.9,
router/src/lib.rs and backends/candle/src/lib.rs; vLLM's pages on pooling models and vllm/transformers_utils/config.py):

    config.json                          the family, `is_causal` of a decoder that was made bidirectional
    modules.json, 1_Pooling              pooling, normalization, a projection
    config_sentence_transformers.json    prompts, which a request chooses by name
    sentence_bert_config.json            where texts are cut
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_retrieval.models.embedding_files import read_settings
from rag_retrieval.models.settings import ModelFiles, RerankerSettings
from rag_retrieval.models.settings import read_settings as read_reranker_settings

TEI_ENCODERS = {"bert", "camembert", "modernbert", "new", "nomic_bert", "roberta", "xlm-roberta"}
TEI_DECODERS = {"mistral", "qwen2", "qwen3"}
TEI_ON_GPU_ALONE = {"mistral", "qwen2"}
TEI_BIDIRECTIONAL = {"qwen2"}  # families where it reads `is_causal`
TEI_SPLADE = {"bert", "camembert", "distilbert", "roberta", "xlm-roberta"}
TEI_RERANKERS = {"bert", "camembert", "modernbert", "new", "roberta", "xlm-roberta"}
TEI_POOLING = {"cls": "cls", "mean": "mean", "last": "last-token"}
VLLM_ENCODERS = {"bert", "modernbert", "nomic_bert", "roberta", "xlm-roberta"}
VLLM_DECODERS = {"gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"}
VLLM_BIDIRECTIONAL = {"llama", "mistral", "qwen2", "qwen3"}
VLLM_RERANKERS = {"bert", "roberta", "xlm-roberta"}
VLLM_RERANKING_DECODERS = {"gemma", "llama", "mistral", "qwen2", "qwen3"}

TEI = "text-embeddings-router --model-id {name} --auto-truncate"
VLLM = "vllm serve {name} --runner pooling"
PROMPTS = (
    "A request chooses the text that stands before its texts. text-embeddings-inference: `/embed` with "
    '`"prompt_name": "query"` or `"document"`. vLLM: `/v2/embed` with `"input_type": "query"` or `"document"`. Their '
    "`/v1/embeddings` puts nothing there: write it yourself."
)
NORMALIZED = 'text-embeddings-inference makes vectors to length 1 unless a request says `"normalize": false`.'


def embedder_commands(model: Path) -> str:
    files = ModelFiles(str(model))
    settings, family = read_settings(files), files.config.get("model_type", "")
    names, pooling, bidirectional = settings["representations"], settings.get("pooling"), settings.get("bidirectional")
    others = []
    if names == ("lexical",) and settings["lexical"] == "splade" and family in TEI_SPLADE:
        others = [f"{TEI} --pooling splade"]
    elif "dense" in names and (settings.get("include_prompt", True) or not settings.get("prompts")):
        if serves(family, pooling, TEI_ENCODERS, TEI_BIDIRECTIONAL if bidirectional else TEI_DECODERS):
            others.append(f"{TEI} --pooling {TEI_POOLING[pooling]}")
        if serves(family, pooling, VLLM_ENCODERS, VLLM_BIDIRECTIONAL if bidirectional else VLLM_DECODERS):
            others.append(VLLM)
    return section("rag-retrieval serve --embedder {name}", others, embedder_notes(family, settings), model)


def serves(family: str, pooling: str | None, encoders: set[str], decoders: set[str]) -> bool:
    poolings = ("cls", "mean") if family in encoders else ("cls", "mean", "last") if family in decoders else ()
    return pooling in poolings


def embedder_notes(family: str, settings: dict[str, Any]) -> list[str]:
    """What requests to the other servers have to say, and where what they give differs."""
    names = settings["representations"]
    applies = {
        "text-embeddings-inference answers `/embed_sparse` with these weights.": names == ("lexical",),
        "text-embeddings-inference runs this family on a GPU alone.": family in TEI_ON_GPU_ALONE,
        "The other servers give the dense vectors of this model alone.": len(names) > 1,
        NORMALIZED: "dense" in names and not settings.get("normalize", True),
        "The other servers cut queries where they cut documents.": "query_max_length" in settings,
        "The other servers have one cls in a long text, and so another vector of it.": "cls_interval" in settings,
        PROMPTS: bool(settings.get("prompts")),
    }
    return [note for note, holds in applies.items() if holds]


def reranker_commands(model: Path) -> str:
    config, settings = ModelFiles(str(model)).config, read_reranker_settings(str(model))
    family, others, notes = config.get("model_type", ""), [], []
    if settings is None or settings.model_type != "llm_decoder":
        if family in TEI_RERANKERS:
            others.append(TEI)
            notes.append('text-embeddings-inference answers with logits where a request says `"raw_scores": true`.')
        others += [VLLM] if family in VLLM_RERANKERS else []
    elif family in VLLM_RERANKING_DECODERS and settings.start_layer is None:
        others = ["hf download {name} --local-dir {name}  # vLLM reads the template of a pair from a file"]
        answers = answer_options(config["architectures"][0], settings) if settings.head == "yes_no" else ""
        others.append(f"{VLLM} --chat-template {{name}}/chat_template.jinja{answers}")
    return section("rag-retrieval serve --model {name}", others, notes, model)


def answer_options(architecture: str, settings: RerankerSettings) -> str:
    """vLLM makes one row of those of yes and no, or takes that of yes alone."""
    values = {
        "architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")],
        "classifier_from_token": [settings.no_token, settings.yes_token] if settings.no_token else [settings.yes_token],
        "method": "from_2_way_softmax" if settings.no_token else "no_post_processing",
    }
    text = shlex.quote(json.dumps(values, ensure_ascii=False))
    return " \\\n  --hf-overrides " + text.replace("{", "{{").replace("}", "}}")


def section(own: str, others: Sequence[str], notes: Sequence[str], model: Path) -> str:
    """The text for a card, with {name} for the model's name. The other servers want weights of transformers, which an
    exported folder and a LoRA adapter do not have."""
    others = others if any(model.glob("model*.safetensors")) else []
    block = "\n".join(["```bash", own, *others, "```"])
    return f"{block}\n\n{' '.join(notes)}" if others and notes else block
