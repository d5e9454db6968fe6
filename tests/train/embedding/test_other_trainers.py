"""Files and commands of RAG-Retrieval, FlagEmbedding and PaddleNLP are read as they are. Runs are in test_run."""

import shlex

import numpy as np
import pytest
from other_trainers import FLAG_EMBEDDING, PADDLE, RAG_DISTILL, RAG_TRAIN, SHORT
from training_runs import ROOT, write_jsonl

from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.other_trainers import ALIASES, FORMATS, TRANSLATIONS, WITHOUT_EFFECT

REQUIRED = {"model_name_or_path": "owner/model", "train_dataset": "train.jsonl", "output_dir": "out"}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The configuration of a command typed where its files are."""
    monkeypatch.chdir(tmp_path)
    for name in ("ft_data/training_neg_10.json", "data/dureader_dual.train.jsonl", "toy_finetune_data.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"query": "q", "pos": ["d"]}])
    (tmp_path / "bge-large-zh-v1.5").mkdir()
    return lambda command: load_config(EmbeddingConfig, None, shlex.split(command))


def test_a_command_of_flag_embedding(read):
    config = read(FLAG_EMBEDDING)
    assert (config.batch_size, config.epochs, config.lr, config.warmup_proportion) == (4, 3, 1e-5, 0.1)
    assert (config.query_max_len, config.passage_max_len, config.train_group_size) == (512, 512, 8)
    assert config.query_instruction == "Represent this sentence for searching relevant passages: "
    assert (config.pooling, config.normalize, config.temperature) == ("cls", True, 0.02)
    assert (config.mixed_precision, config.overwrite_output_dir) == ("fp16", True)
    assert (config.log_interval, config.save_steps, config.teacher_loss_type) == (200, 2000, None)
    assert "pad_to_multiple_of" in config.ignored and "kd_loss_type" in config.ignored
    older = read(FLAG_EMBEDDING + " --normlized True --negatives_cross_device --dataloader_drop_last True")
    assert older.normalize and older.negatives_cross_device and "dataloader_drop_last" in older.ignored


def test_a_command_of_paddle_nlp_has_its_defaults(read):
    config = read(PADDLE)
    assert (config.fine_tune_type, config.gradient_checkpointing, config.use_mrl) == ("sft", True, True)
    assert (config.batch_size, config.train_group_size, config.pooling) == (64, 4, "cls")
    assert (config.temperature, config.margin, config.query_max_len) == (0.02, 0.2, 32)
    assert config.widths == [64, 128, 256, 512, 768] and config.mrl_dims is None and config.mrl_weights == [1] * 5
    assert "mrl_weights" not in read(PADDLE.replace("--use_matryoshka", "")).model_fields_set
    assert config.ignored.startswith("ignored in this run: do_train (")
    assert read(PADDLE + " --query_max_len 64 --margin 0").query_max_len == 64


def test_a_short_command(read):
    config = read(SHORT)
    assert (config.epochs, config.batch_size, config.train_group_size, config.lr) == (2, 2, 2, 1e-5)
    assert config.query_instruction == "" and config.ignored is None
    assert config.margin == 0 and config.mixed_precision == "no"


@pytest.fixture
def files(tmp_path):
    np.zeros(3584, np.float32).tofile(tmp_path / "teacher.mmap")
    train = write_jsonl(tmp_path / "train.jsonl", [{"query": "q", "pos": ["d"], "neg": ["e"]}])
    return {"train": train, "vectors": str(tmp_path / "teacher.mmap")}


def test_a_training_file_of_rag_retrieval(files, tmp_path):
    (tmp_path / "a.yaml").write_text(RAG_TRAIN.format(**files))
    config = load_config(EmbeddingConfig, str(tmp_path / "a.yaml"))
    assert (config.loss_type, config.train_group_size, config.negatives_cross_device) == ("info_nce", 6, True)
    assert (config.epochs, config.lr, config.batch_size, config.seed) == (2, 2e-5, 8, 666)
    assert (config.gradient_accumulation_steps, config.mixed_precision, config.log_with) == (3, "bf16", "wandb")
    assert config.save_on_epoch_end is True and config.widths is None and "mrl_dims" in config.ignored
    with_widths = load_config(EmbeddingConfig, str(tmp_path / "a.yaml"), ["--use_mrl"])
    assert with_widths.widths == [128, 256, 512, 768, 1024, 1280, 1536, 1792]
    assert load_config(EmbeddingConfig, str(tmp_path / "a.yaml"), ["--dataset", files["vectors"]]).train_files == [
        files["vectors"]
    ]


@pytest.mark.parametrize("width", ["teacher_embedding_dim", "teacher_emebedding_dim", "teatch_emebedding_dim"])
def test_a_distillation_file_of_rag_retrieval(files, tmp_path, width):
    (tmp_path / "a.yaml").write_text(RAG_DISTILL.format(**files, width=width))
    config = load_config(EmbeddingConfig, str(tmp_path / "a.yaml"))
    assert (config.loss_type, config.record_kind, config.teacher_embedding_dim) == ("stella", "teacher_vectors", 3584)
    assert config.train_dataset_vec == [files["vectors"]] and config.shuffle is False
    assert config.widths[-1] == 3584 and config.save_on_epoch_end is False
    assert "safe_serialization" in config.ignored


def test_values_of_other_trainers_mean_ours():
    def config(**changes):
        return EmbeddingConfig(**REQUIRED | changes)

    assert config(sentence_pooling_method="last_token").pooling == "last"
    assert config(fp16=False, bf16=True).mixed_precision == "bf16"
    assert config(neg_nums=0).train_group_size == 1
    asked = {"query_instruction": "Find it", "query_instruction_format": "Instruct: {}\\nQuery: {}"}
    assert config(**asked).query_instruction == "Instruct: Find it\nQuery: "
    assert config(query_instruction_format="Instruct: {}\nQuery: {}").query_instruction is None
    asked = {"passage_instruction_for_retrieval": "p: ", "passage_instruction_format": "<{}>{}"}
    assert config(**asked).document_instruction == "<p: >"
    taught = config(knowledge_distillation=True)
    assert (taught.teacher_loss_type, taught.teacher_score_key) == ("kl_distillation", "teacher_score")
    taught = config(knowledge_distillation=True, kd_loss_type="m3_kd_loss")
    assert (taught.loss_type, taught.teacher_loss_type) == ("m3_distillation", None)


def test_wrong_values_of_other_trainers_are_reported_by_their_key(tmp_path):
    wrong = {
        "fp16": "perhaps",
        "train_type": "eval",
        "neg_nums": -1,
        "knowledge_distillation": "some",
        "query_instruction_format": "{}",
    }
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=f"--{name}: "):
            options = ["--query_instruction", "x", f"--{name}={value}"]
            load_config(EmbeddingConfig, None, options)
    with pytest.raises(ValueError, match="kl_div or m3_kd_loss"):
        EmbeddingConfig(**REQUIRED, knowledge_distillation=True, kd_loss_type="mse")
    with pytest.raises(ValueError, match="mixed_precision bf16"):
        EmbeddingConfig(**REQUIRED, fp16=True, mixed_precision="bf16")
    with pytest.raises(ValueError, match="given twice"):
        EmbeddingConfig(**REQUIRED, train_data="other.jsonl")


def test_the_page_has_every_key_of_other_trainers():
    page = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    for name in (*ALIASES, *WITHOUT_EFFECT, *TRANSLATIONS, *FORMATS, "knowledge_distillation", "kd_loss_type"):
        assert f"`{name}`" in page, name
