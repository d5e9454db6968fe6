"""The work `train_embedding` of `speed.py`: an embedder's optimizer step, beside sentence-transformers' losses.

    python benchmarks/speed.py --work train_embedding --data ../shared/data/medquad --threads 1 --out speed.jsonl

A step has `--queries-per-step` queries, each with a positive and three negatives, all documents of the step being
negatives of the other queries. Ours is the loop that the command runs, theirs `SentenceTransformerTrainer` with
MultipleNegativesRankingLoss, and with its cached form at each size of `--st-batch`; FlagEmbedding's trainer of encoders
joins where it is installed. The texts are training records that `quality.py` makes of `--data`, or of log-normal length
without it. No model has dropout.
"""

import argparse
import importlib.util
import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from quality_trainers import as_dataset
from speed_data import Example, draw_examples, single_token_words, without_dropout
from speed_encoding import cpu_floor, make_embedder_folder
from speed_floor import TRAINING, model_cost
from speed_report import FLAG, OURS, THEIRS, summary_of_side
from speed_training import (
    DTYPES,
    SEED,
    WARMUP,
    Job,
    StepClock,
    Took,
    marks,
    our_settings,
    run_ours,
    their_settings,
    trainer_at,
)
from speed_works import Disagreement, say, take_turns

NEGATIVES = 3  # of a query
TEMPERATURE = 0.05
LIMITS = {"float32": 1e-4, "bf16": 2e-2}  # relative, of the loss and of the gradient's norm
ALL_GRAPHS = 1 << 20  # tokens


def run_train_embedding(options: argparse.Namespace, scratch: Path) -> dict:
    """Everything that goes into the line of JSON. Raises Disagreement where the sides' first steps differ."""
    say("train_embedding ...")
    job, tokenizer = make_job(options, scratch)
    queries, stride = options.queries_per_step, WARMUP + options.steps
    sizes = {THEIRS: None} | {f"{THEIRS}, cached {size}": size for size in sorted(set(options.st_batch))}
    first_steps = {name: partial(their_first_step, job, size) for name, size in sizes.items()}
    flag = importlib.util.find_spec("FlagEmbedding") is not None
    if flag:
        first_steps[FLAG] = partial(flag_first_step, job)
    else:
        say(f"  {FLAG} takes no part: not installed")
    agreement = compare_first_steps(job, first_steps)
    turns = {OURS: lambda turn: train_ours(job, turn * stride, options.steps)} | {
        name: lambda turn, size=size: train_theirs(job, turn * stride, options.steps, size)
        for name, size in sizes.items()
    }
    if flag:
        turns[FLAG] = lambda turn: train_flag(job, turn * stride, options.steps)
    took, gemm = take_turns(job, turns, options.rounds)
    starts = [turn * stride + WARMUP for turn in range(options.rounds)]
    lengths = [text_lengths(job, tokenizer, job.steps[start : start + options.steps]) for start in starts]
    cost = model_cost(job.model)
    flops = [TRAINING * cost.forward_flops(part) for part in lengths]
    floors = [each / gemm["flops_per_second"] / options.steps for each in flops]
    return {
        "work": "train_embedding",
        "model": options.encoder,
        "dtype": job.dtype,
        "device": job.device,
        "threads": options.threads,
        "unit": "step",
        "of": "texts",
        "rounds": options.rounds,
        "units": options.steps,
        "queries": queries,
        "pairs": queries * (2 + NEGATIVES),
        "tokens_of_a_pair": sum(map(sum, lengths)) / sum(map(len, lengths)),
        "max_len": job.max_len,
        "data": options.data and options.data.name,
        "gemm": gemm,
        "floor_seconds": sum(floors) / len(floors),
        "sides": {name: summary_of_side(rounds, took[OURS], floors, options.steps) for name, rounds in took.items()},
        **(cpu_floor(job, took, flops) if job.device == "cpu" else {}),
        "agreement": agreement,
    }


def make_job(options: argparse.Namespace, scratch: Path):
    """What all sides share, as files, and the model's tokenizer."""
    from transformers import AutoTokenizer

    folder = without_dropout(make_embedder_folder(options, scratch), scratch / "without_dropout")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    queries, stride = options.queries_per_step, WARMUP + options.steps
    examples = make_examples(options, queries * max(options.rounds * stride, 2), tokenizer)
    job = Job(
        model=folder,
        file=scratch / "records.jsonl",
        examples=examples,
        formats=None,
        max_len=options.max_len,
        dtype=options.dtype,
        device=options.device,
        workers=options.workers,
        scratch=scratch,
        steps=[examples[start : start + queries] for start in range(0, len(examples), queries)],
    )
    records = [{"query": query, "pos": texts[:1], "neg": texts[1:]} for query, texts, _ in examples]
    job.file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return job, tokenizer


def make_examples(options: argparse.Namespace, count: int, tokenizer) -> list[Example]:
    """Queries, each with a positive and its negatives. No text stands in two of them: the other side would embed it
    twice and take it for a negative of its own query."""
    labels = [1.0] + [0.0] * NEGATIVES
    if options.data is None:
        numbers, fixed = random.Random(SEED), tokenizer.num_special_tokens_to_add()
        return draw_examples(count, len(labels), single_token_words(tokenizer), fixed, numbers)
    from quality import training_records

    from rag_retrieval.data.beir import read_folder

    examples, seen = [], set()
    for record in training_records(read_folder(options.data), 4 * count, NEGATIVES, depth=20, seed=SEED):
        documents = record["pos"] + record["neg"]
        if len(documents) == len(labels) and seen.isdisjoint([record["query"], *documents]):
            examples.append(Example(record["query"], documents, labels))
            seen.update([record["query"], *documents])
    if len(examples) < count:
        raise ValueError(f"{options.data} gives {len(examples)} queries; {count} are needed: fewer --rounds or --steps")
    return examples[:count]


def text_lengths(job: Job, tokenizer, steps: list[list[Example]]) -> list[int]:
    """Tokens of each text of these steps."""
    texts = [text for step in steps for example in step for text in (example.query, *example.documents)]
    return [len(ids) for ids in tokenizer(texts, truncation=True, max_length=job.max_len)["input_ids"]]


def compare_first_steps(job: Job, first_steps: dict[str, Callable[[], tuple[float, float]]]) -> dict:
    """Loss and gradient norm of the first step on every side. Raises Disagreement beyond the precision's limit."""
    ours, largest, theirs = our_first_step(job), 0.0, {}
    for name, first_step in first_steps.items():
        theirs[name] = first_step()
        for what, one, other in zip(("loss", "gradient norm"), ours, theirs[name], strict=True):
            difference = abs(one - other) / abs(one)
            if not difference <= LIMITS[job.dtype]:
                raise Disagreement(
                    f"{what} of the first step: ours {one:.6g}, {name} {other:.6g}; expected to agree within a share "
                    f"of {LIMITS[job.dtype]} in {job.dtype}. Times of sides that compute different things are not "
                    "compared"
                )
            largest = max(largest, difference)
    of = "loss and gradient norm of the first step, as a share,"
    return {"of": of, "largest_difference": largest, "ours": ours, "theirs": theirs}


# --- ours ---


def train_ours(job: Job, first: int, steps: int, tokens_with_graph: int | None = ALL_GRAPHS) -> Took:
    """tokens_with_graph: of a step that are encoded once; None for what the trainer itself takes."""
    clock = StepClock(steps, job.device)
    run_ours(our_trainer(job, first, Path(tempfile.mkdtemp(dir=job.scratch)), tokens_with_graph), clock)
    return clock.took()


def our_first_step(job: Job, tokens_with_graph: int | None = ALL_GRAPHS) -> tuple[float, float]:
    """Loss and gradient norm, from the run's own metrics file."""
    folder = Path(tempfile.mkdtemp(dir=job.scratch))
    trainer = our_trainer(job, 0, folder, tokens_with_graph)
    run_ours(trainer, StepClock(1, job.device))  # a step is logged before the next one ends
    line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return line["loss"], line["grad_norm"]


def our_trainer(job: Job, first: int, output_dir: Path, tokens_with_graph: int | None = ALL_GRAPHS, **changes):
    """changes: of the keys of the configuration."""
    from rag_retrieval.train.embedding.config import EmbeddingConfig
    from rag_retrieval.train.embedding.run import EmbeddingTraining

    values = {
        "model_name_or_path": str(job.model),
        "query_max_len": job.max_len,
        "passage_max_len": job.max_len,
        "train_dataset": str(job.file),
        "train_group_size": 1 + NEGATIVES,
        "shuffle": False,
        "loss_type": "info_nce",
        "temperature": TEMPERATURE,
        "output_dir": str(output_dir),
        "batch_size": len(job.steps[0]),
        "max_tokens_with_graph": tokens_with_graph,
        "log_interval": 1,
    }
    return trainer_at(EmbeddingTraining(EmbeddingConfig(**values | our_settings(job) | changes)), first)


# --- theirs ---


def train_theirs(job: Job, first: int, steps: int, size: int | None) -> Took:
    """size: of the cached loss's mini-batches; None for the loss that keeps all graphs."""
    clock = StepClock(steps, job.device)
    their_trainer(job, first, WARMUP + steps, size, clock)[0].train()
    return clock.took()


def their_first_step(job: Job, size: int | None) -> tuple[float, float]:
    """Loss and gradient norm."""
    trainer, losses = their_trainer(job, 0, 1, size, StepClock(1, job.device))
    trainer.train()
    norm = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
    return float(losses[0]), float(norm)


def their_trainer(job: Job, first: int, steps: int, size: int | None, clock: StepClock):
    """The trainer, and the list to which each of its steps will add its loss."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from transformers import PrinterCallback

    model = SentenceTransformer(str(job.model), device=job.device, model_kwargs={"dtype": DTYPES["float32"]})
    settings = SentenceTransformerTrainingArguments(
        per_device_train_batch_size=len(job.steps[0]), logging_steps=1, **their_settings(job, steps)
    )
    if size is None:
        loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=size)
    values: list[torch.Tensor] = []
    loss.register_forward_hook(lambda module, inputs, value: values.append(value.detach()))
    names = ["anchor", "positive", *(f"negative_{place}" for place in range(NEGATIVES))]
    rows = [
        dict(zip(names, [example.query, *example.documents], strict=True))
        for step in job.steps[first : first + steps]
        for example in step
    ]
    trainer = SentenceTransformerTrainer(
        model=model, args=settings, train_dataset=as_dataset(rows), loss=loss, callbacks=[marks(clock)]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, values


# --- FlagEmbedding's ---


def train_flag(job: Job, first: int, steps: int) -> Took:
    clock = StepClock(steps, job.device)
    flag_trainer(job, first, WARMUP + steps, clock)[0].train()
    return clock.took()


def flag_first_step(job: Job) -> tuple[float, float]:
    """Loss and gradient norm."""
    trainer, losses = flag_trainer(job, 0, 1, StepClock(1, job.device))
    trainer.train()
    norm = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
    return float(losses[0]), float(norm)


def flag_trainer(job: Job, first: int, steps: int, clock: StepClock):
    """As `their_trainer`, from the same arguments as its command. Its records are taken in the order of the file."""
    from FlagEmbedding.abc.finetune.embedder import (
        AbsEmbedderDataArguments,
        AbsEmbedderModelArguments,
        AbsEmbedderTrainingArguments,
    )
    from FlagEmbedding.finetune.embedder.encoder_only.base import EncoderOnlyEmbedderRunner
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback

    folder = Path(tempfile.mkdtemp(dir=job.scratch))
    lines, queries = job.file.read_text(encoding="utf-8").splitlines(), len(job.steps[0])
    file = folder / "records.jsonl"
    file.write_text("\n".join(lines[first * queries : (first + steps) * queries]) + "\n", encoding="utf-8")
    settings = {name: value for name, value in their_settings(job, steps).items() if name != "batch_sampler"}
    data = AbsEmbedderDataArguments(
        train_data=[str(file)],
        cache_path=str(folder / "cache"),
        train_group_size=1 + NEGATIVES,
        query_max_len=job.max_len,
        passage_max_len=job.max_len,
    )
    training = AbsEmbedderTrainingArguments(
        **settings | {"output_dir": str(folder / "out")},
        per_device_train_batch_size=queries,
        logging_steps=1,
        temperature=TEMPERATURE,
        sentence_pooling_method="mean",
        normalize_embeddings=True,
    )
    runner = EncoderOnlyEmbedderRunner(AbsEmbedderModelArguments(str(job.model)), data, training)
    runner.trainer._get_train_sampler = lambda *_: SequentialSampler(runner.train_dataset)
    runner.trainer.add_callback(marks(clock))
    runner.trainer.remove_callback(PrinterCallback)
    values: list[torch.Tensor] = []
    runner.model.register_forward_hook(lambda module, inputs, output: values.append(output.loss.detach()))
    return runner.trainer, values
