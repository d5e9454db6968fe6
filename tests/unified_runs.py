"""Runs that train several representations, for tests of exactness on one process and on engines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import embedding_records, final_weights, read_metrics, write_jsonl

from rag_retrieval.models.embedder import EmbeddingModel

# 3 steps: warmup of round(0.4 * 3) = 1, then half a cosine over 2
SCHEDULE = {"warmup_proportion": 0.4, "stable_proportion": 0.0}
FACTORS = [1.0, 1.0, 0.5]
STEP = 16
KINDS = {
    "unified": {
        "representations": ["dense", "lexical", "multi_vector"], "use_self_distill": True,
        "self_distill_start_step": 0, "temperature": 0.05,
    },
    "splade": {
        "representations": "lexical", "lexical_method": "splade", "lambda_query": 0.1, "lambda_document": 0.2,
        "flops_ramp_steps": 2,
    },
    "colbert": {"representations": "multi_vector", "colbert_dim": 16, "query_max_len": 8},
}  # fmt: skip
# of two runs that differ by float noise. SPLADE's losses and gradients add up a whole vocabulary: 1.1e-5 was seen
TOLERANCES = {"unified": 1e-5, "splade": 5e-5, "colbert": 1e-5}


def with_heads(bert: str, folder: Path) -> str:
    """A folder in bge-m3's layout whose heads are random numbers of a size that matters."""
    model = EmbeddingModel.from_pretrained(bert, representations=["dense", "lexical", "multi_vector"], colbert_dim=16)
    generator = torch.Generator().manual_seed(0)
    for each in model.token_heads.parameters():
        torch.nn.init.normal_(each, std=0.3, generator=generator)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    return str(folder)


def settings(folder: Path, bert: str) -> dict[str, dict]:
    """The configuration of each kind, but for its output folder."""
    shared = SCHEDULE | {
        "task": "embedding",
        "model_name_or_path": bert,
        "query_max_len": 24,
        "passage_max_len": 48,
        "train_dataset": write_jsonl(folder / "train.jsonl", embedding_records(3 * STEP)),
        "batch_size": STEP,
        "lr": 1e-3,
        "adam_epsilon": 1e-3,  # Adam divides rounding noise by itself where a gradient is zero: key biases
        "max_grad_norm": 0.5,
        "num_workers": 0,
        "log_interval": 1,
        "save_on_epoch_end": False,
    }
    heads = {
        "model_name_or_path": with_heads(bert, folder / "m3" / "model"),
        "val_dataset": write_jsonl(folder / "val.jsonl", embedding_records(12, seed=3)),
        "metric_for_best_model": "lexical/ndcg@10",
    }
    return {kind: shared | keys | (heads if kind == "unified" else {}) for kind, keys in KINDS.items()}


def all_weights(output_dir: str | Path) -> dict[str, torch.Tensor]:
    """Those of the model and of its heads."""
    folder, weights = Path(output_dir) / "model", final_weights(output_dir)
    for file in folder.glob("*_linear.pt"):
        found = torch.load(file, weights_only=True)
        weights |= {f"{file.stem}.{name}": value for name, value in found.items()}
    for file in folder.glob("*/model.safetensors"):
        weights |= {f"{file.parent.name}.{name}": value for name, value in load_file(file).items()}
    return weights


def outcome(values: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [line["loss"] for line in read_metrics(Path(values["output_dir"]), "train")]
    return losses, all_weights(values["output_dir"])


def assert_same(found, expected, tolerance: float) -> None:
    """Relatively; weights below 0.1 count as that large."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() >= expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=tolerance, atol=0.1 * tolerance)
