"""Every shipped configuration trains, and every command of another trainer, on a tiny model and a few records."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from other_trainers import (
    FLAG_EMBEDDING,
    FLAG_EMBEDDING_M3,
    PADDLE,
    RAG_COLBERT,
    RAG_DISTILL,
    RAG_TRAIN,
    SHORT,
)
from training_runs import ROOT, embedding_records, read_metrics, write_jsonl

from rag_retrieval.core.config_reader import load_config
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.train_embedding import main

TRAINER = ROOT / "rag_retrieval" / "train" / "embedding"
FILES = sorted(path.name for path in (TRAINER / "config").glob("*.yaml"))
LLM = "training_llm_lora.yaml"


def test_the_kinds_of_files_that_are_promised_are_there():
    configs = {name: load_config(EmbeddingConfig, str(TRAINER / "config" / name)) for name in FILES}
    assert "training_embedding.yaml" in FILES
    assert any("bge" in config.model_name_or_path and "zh" in config.model_name_or_path for config in configs.values())
    assert (configs[LLM].pooling, configs[LLM].fine_tune_type) == ("last", "lora") and configs[LLM].query_instruction
    assert any(config.use_mrl for config in configs.values())
    assert any(config.reads_teacher for config in configs.values())
    assert any(config.record_kind == "teacher_vectors" for config in configs.values())
    kinds = {(*config.representations, config.lexical_method) for config in configs.values()}
    assert {("dense", "lexical", "multi_vector", "linear"), ("lexical", "splade"), ("multi_vector", None)} <= kinds


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_configuration_is_valid_from_any_folder(name, tmp_path, monkeypatch):
    for folder in (ROOT, TRAINER, tmp_path):
        monkeypatch.chdir(folder)
        config = load_config(EmbeddingConfig, str(TRAINER / "config" / name))
        assert all(Path(file).is_file() for file in [*config.train_files, config.val_dataset])
        assert config.ignored is None


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_configuration_trains(name, tmp_path, monkeypatch, bert, qwen2):
    monkeypatch.chdir(TRAINER)
    val = write_jsonl(tmp_path / "val.jsonl", embedding_records(4))
    options = f"--model_name_or_path {qwen2 if name == LLM else bert} --output_dir {tmp_path / 'run'} --epochs 1"
    small = f"--max_example_num_per_dataset 4 --batch_size 2 --num_workers 0 --mixed_precision no --val_dataset {val}"
    assert main(["--config", name, *shlex.split(f"{options} {small}")]) == 0
    assert len(read_metrics(tmp_path / "run", "eval")) == 2
    names = load_config(EmbeddingConfig, str(TRAINER / "config" / name)).representations
    encoded = Embedder(tmp_path / "run" / "model").encode(["a text"], outputs=names)
    assert all(len(getattr(encoded, each)) == 1 for each in names)


@pytest.fixture
def typed(tmp_path, monkeypatch, bert):
    """Runs a command where its files are, with a tiny model in place of its own."""
    monkeypatch.chdir(tmp_path)
    records = [{"query": "what is rain", "pos": ["rain is water"], "neg": ["Paris is a city"] * 8}] * 3
    for name in ("ft_data/training_neg_10.json", "data/dureader_dual.train.jsonl", "toy_finetune_data.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, records)
    (tmp_path / "bge-large-zh-v1.5").symlink_to(bert)

    def run(command: str) -> int:
        for hub_name in ("bert-base-uncased", "rocketqa-zh-base-query-encoder"):
            command = command.replace(hub_name, bert)
        return main([*shlex.split(command), "--num_workers", "0"])

    return run


def test_a_command_of_flag_embedding_trains_and_fp16_is_refused_without_a_gpu(typed, tmp_path, capfd):
    assert typed(FLAG_EMBEDDING.replace("--fp16", "")) == 0
    assert (tmp_path / "output" / "neg10" / "model" / "modules.json").is_file()
    assert typed(FLAG_EMBEDDING) == 2
    assert "fp16" in capfd.readouterr().err


def test_a_command_of_paddle_nlp_trains(typed, tmp_path):
    assert typed(PADDLE) == 0
    config = (tmp_path / "checkpoints" / "model" / "config.json").read_text()
    assert "matryoshka_dimensions" in config


def test_a_short_command_trains(typed, tmp_path):
    assert typed(SHORT) == 0
    assert Embedder(tmp_path / "checkpoint" / "model").encode_queries(["rain"]).shape == (1, 32)


def test_a_command_of_flag_embedding_s_m3_trainer_writes_its_folder(typed, tmp_path):
    """With the scores of a teacher, since it asks for knowledge_distillation."""
    scored = {"query": "what is rain", "pos": ["rain is water"], "neg": ["Paris is a city"] * 2}
    write_jsonl(tmp_path / "train.jsonl", [scored | {"pos_scores": [3.0], "neg_scores": [0.5, -1.0]}] * 3)
    assert typed(FLAG_EMBEDDING_M3.replace("BAAI/bge-m3", "bert-base-uncased")) == 0
    assert {"colbert_linear.pt", "sparse_linear.pt"} <= {file.name for file in (tmp_path / "out/model").iterdir()}


def test_a_command_of_rag_retrieval_s_colbert_trainer_trains_token_vectors(typed, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"query": "what is rain", "pos": ["rain is water"], "neg": ["Paris"]}] * 3)
    command = RAG_COLBERT.replace("hfl/chinese-roberta-wwm-ext", "bert-base-uncased").replace("--log_with wandb", "")
    assert typed(command) == 0
    vectors = Embedder(tmp_path / "out" / "model").encode_queries(["rain"], outputs=["multi_vector"]).multi_vector
    assert vectors[0].shape == (4, 768), "cls, r, ##ain, sep: no prefix and no mask tokens"


@pytest.mark.slow
def test_torchrun_starts_the_script(typed, tmp_path, bert):
    script = str(TRAINER / "train_embedding.py")
    arguments = shlex.split(SHORT.replace("./bge-large-zh-v1.5", bert)) + ["--num_workers", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", script]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "checkpoint" / "model" / "config.json").is_file()


def test_a_file_of_rag_retrieval_trains_with_a_projection(tmp_path, bert):
    train = write_jsonl(tmp_path / "train.jsonl", embedding_records(6))
    text = RAG_TRAIN.format(train=train).replace("BAAI/bge-base-zh-v1.5", bert).replace("./output", str(tmp_path))
    text = text.replace("use_mrl: false", "use_mrl: true").replace('log_with: "wandb"', "log_with:")
    (tmp_path / "a.yaml").write_text(text.replace("mixed_precision: bf16", "mixed_precision: no"))
    assert main(["--config", str(tmp_path / "a.yaml"), "--num_workers", "0", "--epochs", "1"]) == 0
    folder = tmp_path / "t2ranking_100_example" / "model"
    assert Embedder(folder).encode(["a text"]).shape == (1, 1792)
    assert "models.Dense" in (folder / "modules.json").read_text()


def test_a_distillation_file_of_rag_retrieval_trains_to_the_teacher_s_width(tmp_path, bert):
    train = write_jsonl(tmp_path / "train.jsonl", [{"query": text} for text in ("rain", "a city", "what is water")])
    np.random.default_rng(0).normal(size=3 * 3584).astype(np.float32).tofile(tmp_path / "teacher.mmap")
    text = RAG_DISTILL.format(train=train, vectors=tmp_path / "teacher.mmap", width="teacher_emebedding_dim")
    text = text.replace("BAAI/bge-base-zh-v1.5", bert).replace("./output", str(tmp_path))
    (tmp_path / "a.yaml").write_text(text.replace("mixed_precision: bf16", "mixed_precision: no"))
    options = ["--num_workers", "0", "--epochs", "1", "--batch_size", "4"]
    assert main(["--config", str(tmp_path / "a.yaml"), *options]) == 0
    assert Embedder(tmp_path / "t2ranking_100_example_distill" / "model").encode(["a text"]).shape == (1, 3584)
