"""What training tests share: small data, the keys of a small run, and runs in this process or in several."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tiny_models import ENGLISH

from rag_retrieval.core.command import load_object
from rag_retrieval.train.script import TRAINERS

ROOT = Path(__file__).resolve().parents[1]
WORDS = sorted({word.strip(".,;?") for text in ENGLISH for word in text.split()})


def without_dropout(folder: str) -> str:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config |= {
        name: 0.0 for name in ("hidden_dropout_prob", "attention_probs_dropout_prob") if name in config
    }
    path.write_text(json.dumps(config))
    return folder


def text(random_numbers: random.Random, words: int) -> str:
    return " ".join(random_numbers.choices(WORDS, k=words))


def grouped_records(count: int, seed: int = 0, sizes=(2, 3, 5, 8), levels=(0, 1)) -> list[dict]:
    """hits records of unequal size, the first document with the highest label and the others without
    relevance.

    The positive repeats the query's words, so that a model can learn something.
    """
    numbers = random.Random(seed)
    records = []
    for place in range(count):
        query = text(numbers, 4)
        labels = [levels[-1]] + numbers.choices(levels[:-1], k=sizes[place % len(sizes)] - 1)
        hits = [
            {"content": text(numbers, 6) + (" " + query if label == levels[-1] else ""), "label": label}
            for label in labels
        ]
        records.append({"query": query, "hits": hits})
    return records


def pointwise_records(count: int, seed: int = 0, labels=(0, 1)) -> list[dict]:
    """Every query has four pairs, side by side."""
    numbers = random.Random(seed)
    records = []
    for place in range(count):
        if place % 4 == 0:
            query = text(numbers, 4)
        label = labels[place % len(labels)]
        document = text(numbers, 6) + (" " + query if label == labels[-1] else "")
        records.append({"query": query, "content": document, "label": label})
    return records


def embedding_records(count: int, seed: int = 0) -> list[dict]:
    """Queries with one positive, which repeats a part of it, and none to three hard negatives. Some documents stand in
    several records, and every fifth query twice, with another positive each time."""
    numbers = random.Random(seed)
    shared = [text(numbers, 5) for _ in range(3)]
    records = []
    for place in range(count):
        query = records[-1]["query"] if place % 5 == 4 else text(numbers, 4)
        negatives = [numbers.choice([text(numbers, 6), *shared]) for _ in range(place % 4)]
        positive = f"{text(numbers, 9)} {query.split()[0]} {place}"
        records.append({"query": query, "pos": [positive], "neg": [*dict.fromkeys(negatives)]})
    return records


def plain_texts(count: int, seed: int = 0) -> list[dict]:
    """Texts of 3 to 14 words; every fifth one repeats the one before it."""
    numbers = random.Random(seed)
    rows: list[dict] = []
    for place in range(count):
        rows.append(rows[-1] if place % 5 == 4 else {"text": text(numbers, 3 + place % 12)})
    return rows


def with_teacher_scores(records: list[dict], seed: int = 0) -> list[dict]:
    """The records with a logit beside each label: twice the label, and noise."""
    numbers = random.Random(seed)

    def scored(labelled: dict) -> dict:
        return labelled | {"teacher_score": 2 * labelled["label"] + numbers.gauss(0, 1)}

    return [
        record | {"hits": [scored(hit) for hit in record["hits"]]} if "hits" in record else scored(record)
        for record in records
    ]


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read_metrics(output_dir: Path, kind: str) -> list[dict]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def train(values: dict):
    """Train in this process what the key `task` says, a reranker without it; returns the final state."""
    AcceleratorState._reset_state(True)
    trainer = TRAINERS[values.get("task", "reranker")]
    return load_object(f"{trainer.work[0]}:run")(load_object(trainer.config)(**values))


def final_weights(output_dir: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(output_dir) / "model" / "model.safetensors")


def write_yaml(path: Path, values: dict) -> str:
    path.write_text(json.dumps(values))  # JSON is YAML
    return str(path)


def engine_command(config_file: str, processes: int, script: str) -> list[str]:
    """Arguments of `launch` that start a script under an accelerate file, on a port that is free."""
    arguments = ["--config_file", config_file, "--num_processes", str(processes), "--main_process_port", "0"]
    return ["accelerate.commands.launch", *arguments, script]


def launch(command: list[str], timeout: float = 1500, **environment: str) -> subprocess.CompletedProcess:
    """Run a launcher of this Python's environment from the repository root, one thread per process."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.setdefault(name, "1")
    program = [sys.executable, "-m", *command]
    return subprocess.run(
        program, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )
