"""Every option for opening a model, through every entry: it changes the opened model, or a message names it."""

import logging
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_models import bring_code, tiny_bert, tiny_qwen2
from transformers import AutoTokenizer
from yes_no_samples import YES_NO, tiny_causal

from rag_retrieval import EvaluationConfig, ExportConfig, LLMDecoder, MiningConfig, Reranker, load_reranker
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.models.options import ModelOptions
from rag_retrieval.serve.config import ServeConfig

pytest.importorskip("bm25s")

logger = logging.getLogger(__name__)

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}answer:"
FORMATS = dict(query_format="Q: {}", document_format="D: {}", seq="\n", special_token=" ?")


class Opened(Exception):
    """Ends a command at the point where it has opened its model."""


# ---- the entries, each from a folder and options to what it opened ---------------------------------------------


def of_reranker(folder: str, options: dict):
    return Reranker(folder, **options).backend


def of_load_reranker(folder: str, options: dict):
    return load_reranker(folder, **options)


def of_evaluate(folder: str, options: dict):
    from rag_retrieval.evaluate.evaluation import open_reranker

    return open_reranker(folder, warned(EvaluationConfig(model=folder, data="d.jsonl", **options))).backend


def of_mine(folder: str, options: dict):
    from rag_retrieval.mining.miner import device_of, open_reranker

    config = warned(MiningConfig(data="d", output="o.jsonl", reranker=folder, **options))
    return open_reranker(config, device_of(config)).backend


def of_search(folder: str, options: dict):
    from rag_retrieval.retrieval.search import SearchConfig, open_reranker

    return open_reranker(warned(SearchConfig(index="i", query="q", reranker=folder, **options))).backend


def of_distill(folder: str, options: dict):
    from rag_retrieval.distill.run import load_teachers

    config = warned(DistillConfig(dataset="d.jsonl", output="o.jsonl", teachers=folder, **options))
    return load_teachers(config, torch.device("cpu"))[0].backend


def of_serve(folder: str, options: dict):
    from rag_retrieval.serve import server

    with server.opened_service(warned(ServeConfig(model=folder, **options)), None) as service:
        return state(service.endpoints[0].model.backend)


def of_export(folder: str, options: dict):
    from rag_retrieval.export import run

    config = warned(ExportConfig(model=folder, output=f"{folder}-onnx", **options))
    with (
        mock.patch.object(run, "read_check_data"),
        mock.patch.object(run, "own_results", side_effect=Opened) as scored,
        pytest.raises(Opened),
    ):
        run.export_model(config)
    return scored.call_args.args[1].model


ENTRIES = (of_reranker, of_load_reranker, of_evaluate, of_mine, of_search, of_distill, of_serve, of_export)


def warned(config):
    """As `run_command` says which keys do not apply."""
    if config.ignored:
        logger.warning(config.ignored)
    return config


# ---- the options, each with a folder for which it is meant -------------------------------------------------------


def encoder(folder: Path) -> str:
    return tiny_bert(folder, head_labels=1)


def own_code(folder: Path) -> str:
    return bring_code(encoder(folder.with_name("plain")), folder)


def layers(folder: Path) -> str:
    base = tiny_qwen2(folder.with_name("base"), head_labels=1, layers=3)
    LLMDecoder.from_pretrained(base, start_layer=1, **FORMATS).save_pretrained(folder)
    return str(folder)


def answers(folder: Path) -> str:
    """Saved here, with a question of its own."""
    LLMDecoder.from_pretrained(tiny_causal(folder.with_name("causal"), "qwen2"), **YES_NO).save_pretrained(folder)
    return str(folder)


def chat(folder: Path) -> str:
    """A language model that was never a reranker."""
    tiny_causal(folder, "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


QUESTION = dict(head="yes_no", yes_token="1", no_token="0")  # one token each
OPTIONS = {  # option: the folder, a value, and what else must be given with it
    "model_type": (encoder, "llm_decoder", {}),
    "device": (encoder, "cuda:99", {}),
    "devices": (encoder, ["cpu", "cpu"], {}),
    "dtype": (encoder, "bf16", {}),
    "precision": (encoder, "bf16", {}),
    "trust_remote_code": (own_code, True, {}),
    "max_length": (encoder, 24, {}),
    "attn_implementation": (encoder, "eager", {}),
    "query_format": (encoder, "q: {}", {}),
    "document_format": (encoder, "d: {}", {}),
    "split_special_tokens": (encoder, True, {}),
    "seq": (layers, " | ", {}),
    "special_token": (layers, " !", {}),
    "cutoff_layer": (layers, 2, {}),
    "head": (answers, "scalar", {}),
    "instruction": (answers, "find facts", {}),
    "yes_token": (answers, "1", {}),
    "no_token": (answers, "0", {}),
}


def test_the_table_has_every_option():
    assert OPTIONS.keys() == ModelOptions.model_fields.keys()


def state(opened) -> dict:
    """What decides on the scores of a backend or a model."""
    scorer, shared = getattr(opened, "scorer", opened), getattr(opened, "_shared", None)
    encoder = scorer.pair_encoder
    return {
        "settings": asdict(scorer.settings),
        "template": asdict(encoder.template),
        "tokens": (encoder.max_length, encoder.split_special_tokens),
        "weights": (scorer.dtype, scorer.config.num_hidden_layers, scorer.packing_problem),
        "computed": (shared.precision, len(shared.models)) if shared else None,
    }


def result(entry, folder: str, options: dict) -> dict | str:
    """The state of what was opened, or the error."""
    try:
        opened = entry(folder, options)
        return opened if isinstance(opened, dict) else state(opened)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_option_changes_what_is_opened_or_is_named(entry, tmp_path, caplog):
    for number, (option, (make, value, others)) in enumerate(OPTIONS.items()):
        (tmp_path / f"{number}").mkdir()
        folder = make(tmp_path / f"{number}" / "model")
        caplog.clear()
        without = result(entry, folder, others)
        assert option not in caplog.text, (option, caplog.text)
        with_it = result(entry, folder, others | {option: value})
        assert with_it != without or option in caplog.text, f"{option}: {with_it}"
