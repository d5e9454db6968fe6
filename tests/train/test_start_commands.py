"""Start commands in the cards of trained models, beside what those servers read of the folder.

The servers do not run here. `read_by_tei` and `read_by_vllm` do what their code does with the files (the sources are
named in `start_commands`).
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from training_runs import embedding_records, grouped_records, train, write_jsonl
from yes_no_samples import YES_NO, tiny_causal

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.train.start_commands import embedder_commands, reranker_commands

OWN_MODULES = {f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
TEI, VLLM = "text-embeddings-router", "vllm serve"


def read(file: Path) -> dict | list:
    return json.loads(file.read_text(encoding="utf-8"))


def read_by_tei(folder: Path) -> str:
    """The pooling that text-embeddings-inference takes for an embedder's folder without --pooling."""
    assert not any(name.endswith("Classification") for name in read(folder / "config.json")["architectures"])
    assert {module["type"] for module in read(folder / "modules.json")} <= OWN_MODULES
    assert read(folder / "sentence_bert_config.json")["max_seq_length"] and (folder / "tokenizer.json").is_file()
    pooling = read(folder / "1_Pooling" / "config.json")
    names = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last-token"}
    return next(name for key, name in names.items() if pooling[f"pooling_mode_{key}"])


def read_by_vllm(folder: Path) -> tuple[str, bool]:
    """Pooling, and whether vectors get length 1."""
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in read(folder / "modules.json")}
    pooling = read(folder / modules["Pooling"] / "config.json")
    modes = [key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True]
    (name,) = (mode.partition("_")[0] for mode in modes if mode != "include_prompt")
    return name.replace("lasttoken", "last"), "Normalize" in modules


def lines_of(text: str) -> list[list[str]]:
    block = re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL).group(1)
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines()]


def served(values: dict) -> tuple[Path, str, list[list[str]]]:
    """The model's folder of a run, the section of its card, and its commands."""
    train(values)
    folder = Path(values["output_dir"]) / "model"
    text = (folder / "README.md").read_text(encoding="utf-8").partition("\n## Serve\n")[2].partition("\n## ")[0]
    return folder, text, lines_of(text)


@pytest.fixture
def embedding(tmp_path):
    """Keys of a run of one step that trains an embedder from a folder."""

    def make(model: str, **changes) -> dict:
        data = write_jsonl(tmp_path / "train.jsonl", embedding_records(8))
        values = {"task": "embedding", "model_name_or_path": model, "train_dataset": data, "batch_size": 8}
        values |= {"passage_max_len": 48, "output_dir": str(tmp_path / "run"), "num_workers": 0}
        return values | {"save_on_epoch_end": False} | changes

    return make


def test_a_trained_embedder_starts_with_the_pooling_and_prompts_of_its_files(embedding, base_folders):
    values = embedding(base_folders["bert"], pooling="cls", query_instruction="query: ", query_max_len=24)
    folder, text, commands = served(values)
    assert commands == [
        ["rag-retrieval", "serve", "--embedder", "run"],
        ["text-embeddings-router", "--model-id", "run", "--auto-truncate", "--pooling", "cls"],
        ["vllm", "serve", "run", "--runner", "pooling"],
    ]
    assert read_by_tei(folder) == "cls" and read_by_vllm(folder) == ("cls", True)
    assert read(folder / "config_sentence_transformers.json")["prompts"]["query"] == "query: "
    assert '`"prompt_name": "query"`' in text and '`"input_type": "query"`' in text
    assert "cut queries where they cut documents" in text and "normalize" not in text


def test_a_trained_decoder_starts_with_its_last_token(embedding, base_folders):
    folder, text, commands = served(embedding(base_folders["qwen2"], query_max_len=48, normalize=False))
    assert commands[1][-2:] == ["--pooling", "last-token"] and commands[2][0] == "vllm"
    assert read_by_tei(folder) == "last-token" and read_by_vllm(folder) == ("last", False)
    assert "on a GPU alone" in text and '`"normalize": false`' in text and "prompt_name" not in text


def test_several_representations_say_that_the_others_give_one(embedding, base_folders):
    names = ["dense", "lexical", "multi_vector"]
    folder, text, commands = served(embedding(base_folders["xlm_roberta"], representations=names))
    assert [command[0] for command in commands] == ["rag-retrieval", "text-embeddings-router", "vllm"]
    assert read_by_tei(folder) == commands[1][-1] == read_by_vllm(folder)[0] == "mean"
    assert "the dense vectors of this model alone" in text


def test_splade_starts_as_such_and_token_vectors_with_our_server_alone(embedding, base_folders):
    splade = embedding(base_folders["bert"], representations="lexical", lexical_method="splade")
    folder, text, commands = served(splade)
    assert commands[1:] == [[TEI, "--model-id", "run", "--auto-truncate", "--pooling", "splade"]]
    assert read(folder / "config.json")["architectures"] == ["BertForMaskedLM"] and "/embed_sparse" in text
    colbert = embedding(base_folders["bert"], representations="multi_vector", overwrite_output_dir=True)
    assert served(colbert)[2] == [["rag-retrieval", "serve", "--embedder", "run"]]


@pytest.mark.parametrize("pooling, include_prompt, others", [
    ("mean", True, [TEI, VLLM]),
    ("mean", False, []),
    ("weighted_mean", True, []),
    ("last", True, []),
])  # fmt: skip
def test_an_encoder_is_named_to_servers_that_pool_as_it_does(base_folders, tmp_path, pooling, include_prompt, others):
    options = {"pooling": pooling, "include_prompt": include_prompt, "prompts": {"query": "q: "}}
    EmbeddingModel.from_pretrained(base_folders["bert"], **options).save_pretrained(tmp_path)
    text = embedder_commands(tmp_path)
    assert [name for name in (TEI, VLLM) if name in text] == others and "--embedder {name}" in text


@pytest.mark.parametrize("family, bidirectional, others", [
    ("qwen2", True, [TEI, VLLM]),
    ("llama", False, [VLLM]),
    ("llama", True, [VLLM]),
])  # fmt: skip
def test_a_decoder_is_named_to_servers_that_know_its_attention(base_folders, tmp_path, family, bidirectional, others):
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling="mean", bidirectional=bidirectional)
    model.save_pretrained(tmp_path)
    text = embedder_commands(tmp_path)
    assert [name for name in (TEI, VLLM) if name in text] == others
    assert read(tmp_path / "config.json").get("is_causal", True) is not bidirectional


def test_a_trained_encoder_reranks_on_all_three(settings):
    folder, text, commands = served(settings(records=grouped_records(4)))
    assert commands == [
        ["rag-retrieval", "serve", "--model", "run"],
        ["text-embeddings-router", "--model-id", "run", "--auto-truncate"],
        ["vllm", "serve", "run", "--runner", "pooling"],
    ]
    assert read(folder / "config.json")["architectures"] == ["BertForSequenceClassification"] and "raw_scores" in text


def test_a_trained_decoder_gives_vllm_its_template(settings, model_folders):
    decoder = {"model_name_or_path": model_folders["qwen2"], "model_type": "llm_decoder"}
    folder, _, commands = served(settings(records=grouped_records(4), **decoder))
    assert [command[0] for command in commands] == ["rag-retrieval", "hf", "vllm"], "hf brings the template"
    assert commands[2][1:] == ["serve", "run", "--runner", "pooling", "--chat-template", "run/chat_template.jinja"]
    assert (folder / "chat_template.jinja").is_file()


def test_a_trained_yes_no_decoder_names_its_answers_to_vllm(settings, tmp_path):
    decoder = {"model_name_or_path": tiny_causal(tmp_path / "base", "qwen3"), "model_type": "llm_decoder"}
    values = settings(records=grouped_records(4), **decoder, **YES_NO | {"max_len": 160})
    folder, _, commands = served(values)
    assert json.loads(commands[2][-1]) == {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": [YES_NO["no_token"], YES_NO["yes_token"]],
        "method": "from_2_way_softmax",
    }
    assert read(folder / "config.json")["architectures"] == ["Qwen3ForCausalLM"]


def test_a_folder_without_weights_of_transformers_is_named_to_no_other_server(model_folders, tmp_path):
    (tmp_path / "config.json").write_text((Path(model_folders["bert"]) / "config.json").read_text())
    (tmp_path / "model.onnx").write_bytes(b"")
    assert lines_of(reranker_commands(tmp_path)) == [["rag-retrieval", "serve", "--model", "{name}"]]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert len(lines_of(reranker_commands(tmp_path))) == 3
