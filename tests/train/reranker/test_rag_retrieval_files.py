"""Configuration files as RAG-Retrieval's users have them, today's and those of its first versions."""

import json

import pytest
from training_runs import grouped_records, read_metrics

from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.train_reranker import main

# every key that its trainer knows, for each model type and data type
OF_MODEL = {
    "bert_encoder": 'query_format: "{}"\ndocument_format: "{}"\nseq: ""\nspecial_token: ""\n',
    "llm_decoder": 'query_format: "query: {}"\ndocument_format: "document: {}"\nseq: "\\n"\nspecial_token: "</s>"\n',
}
OF_DATA = {"pointwise": "point_ce", "grouped": "pairwise_ranknet"}
FIRST_VERSION = """\
# Model
model_name_or_path: "{model}"
model_type: "{model_type}"
num_labels: 1 # one score

# Dataset
train_dataset: "{train}"
val_dataset: "{val}"
max_label: 1
min_label: 0
max_len: 48
{of_model}
# Training
output_dir: "{output_dir}"
save_on_epoch_end: 1
num_max_checkpoints: 5
loss_type: "{loss}"  # "point_ce" or "point_mse"
epochs: 2
lr: 5e-5
batch_size: 4
seed: 666
warmup_proportion: 0.1
gradient_accumulation_steps: 1
mixed_precision: no

## Logging
log_interval: 10
log_with:
"""
SINCE_THEN = """\
train_dataset_type: "{data_type}"
train_label_key: "label"
train_group_size: 10
val_dataset_type: "{data_type}"
val_label_key: "label"
shuffle_rate: 0.0
stable_proportion: 0.0
"""


@pytest.fixture
def write(tmp_path, bert, qwen2):
    """The file for a model type and a data type, with groups of label 1 and 0 in RAG-Retrieval's form."""

    def make(model_type: str, data_type: str, first_version: bool, more: str = "") -> str:
        for name in ("train", "val"):
            with (tmp_path / f"{name}.jsonl").open("w") as file:
                for record in grouped_records(8, seed=len(name)):
                    texts = [[hit["content"] for hit in record["hits"] if hit["label"] == label] for label in (0, 1)]
                    file.write(json.dumps({"query": record["query"], "pos": texts[1], "neg": texts[0]}) + "\n")
        text = FIRST_VERSION + ("" if first_version else SINCE_THEN) + more
        (tmp_path / "train.yaml").write_text(text.format(
            model=bert if model_type == "bert_encoder" else qwen2,
            model_type=model_type,
            of_model=OF_MODEL[model_type],
            data_type=data_type,
            loss=OF_DATA[data_type],
            train=tmp_path / "train.jsonl",
            val=tmp_path / "val.jsonl",
            output_dir=tmp_path / "run",
        ))  # fmt: skip
        return str(tmp_path / "train.yaml")

    return make


@pytest.mark.parametrize("first_version", [True, False])
@pytest.mark.parametrize("data_type", OF_DATA)
@pytest.mark.parametrize("model_type", OF_MODEL)
def test_a_file_is_read_as_it_is(write, model_type, data_type, first_version):
    config = load_config(RerankerConfig, write(model_type, data_type, first_version))
    assert (config.model_type, config.train_dataset_type, config.loss_type) == (
        model_type, data_type, OF_DATA[data_type])  # fmt: skip
    assert (config.save_on_epoch_end, config.num_max_checkpoints, config.epochs) == (True, 5, 2)
    assert (config.lr, config.seed, config.max_len, config.mixed_precision) == (5e-5, 666, 48, "no")
    assert config.query_format == ("{}" if model_type == "bert_encoder" else "query: {}")
    not_read = {"seq", "special_token"} if model_type == "bert_encoder" else set()
    if not first_version and data_type == "pointwise":
        not_read.add("train_group_size")
    assert all(name in (config.ignored or "") for name in not_read)
    assert bool(config.ignored) == bool(not_read)


def test_a_misspelt_key_stays_an_error(write):
    with pytest.raises(ConfigError, match="log_intervall"):
        load_config(RerankerConfig, write("bert_encoder", "pointwise", True, "log_intervall: 3\n"))


@pytest.mark.parametrize(("data_type", "first_version"), [("pointwise", True), ("grouped", False)])
def test_a_file_trains_and_names_what_it_ignores_in_one_line(write, tmp_path, caplog, data_type, first_version):
    with caplog.at_level("WARNING"):
        assert main(["--config", write("bert_encoder", data_type, first_version), "--num_workers", "0"]) == 0
    lines = [line for line in caplog.text.splitlines() if "special_token" in line]
    assert len(lines) == 1 and "seq" in lines[0]
    assert read_metrics(tmp_path / "run", "eval")
    assert (tmp_path / "run" / "model" / "config.json").is_file()




def test_formats_surround_the_texts_of_an_encoder_in_training_and_are_saved(write, tmp_path):
    arguments = ["--config", write("bert_encoder", "pointwise", True), "--num_workers", "0", "--epochs", "1"]
    formats = {"query_format": "panda {}", "document_format": "bamboo: {}"}
    as_options = [part for name, text in formats.items() for part in (f"--{name}", text)]
    assert main([*arguments, "--output_dir", str(tmp_path / "plain")]) == 0
    assert main([*arguments, *as_options]) == 0
    plain, surrounded = (CrossEncoder.from_pretrained(str(tmp_path / name / "model")) for name in ("plain", "run"))
    saved = json.loads((tmp_path / "run" / "model" / "reranker_config.json").read_text())
    assert saved | formats == saved
    pair, by_hand = [("what is a panda", "a bear")], [("panda what is a panda", "bamboo: a bear")]
    assert surrounded.compute_score(pair).tolist() != plain.compute_score(pair).tolist()
    (tmp_path / "run" / "model" / "reranker_config.json").write_text(json.dumps(saved | dict.fromkeys(formats, "{}")))
    without = CrossEncoder.from_pretrained(str(tmp_path / "run" / "model"))
    assert without.compute_score(by_hand).tolist() == surrounded.compute_score(pair).tolist()
    assert without.compute_score(by_hand).tolist() != plain.compute_score(by_hand).tolist(), "trained with them"
