"""One distillation run: the data are read once to check and count them, then teachers score them part by part.

Teachers are rerankers, and causal language models that are asked yes or no. The score of several is the mean of their
logits: that of probabilities would lose what a sure teacher says about the order of documents, since sigmoid(9) and
sigmoid(12) are both nearly 1. A teacher whose logits are larger counts for more.

A part is a stretch of whole records. Which records it holds, and so which pairs share a forward pass, depends on the
data and `pairs_per_part` alone: parts are shards (see `core.shards`), and all that is exchanged is the plan.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.core.config import EngineOptions
from rag_retrieval.core.distributed import on_main, own_device, process_group
from rag_retrieval.core.files import atomic_write, check_new_file, content_digest, lock_file_of, locked
from rag_retrieval.core.shard_folder import MakeShard, ShardFolder, ShardWork
from rag_retrieval.core.shards import run_shards
from rag_retrieval.data.readers import checked_path, is_file, load_hub_dataset, read_records
from rag_retrieval.data.records import DataError, Record, RecordRules
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.distill.output import ScoreSummary, scored_line
from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.infer.torch_backend import TorchBackend
from rag_retrieval.models.prompts import Prompt
from rag_retrieval.models.settings import YES_NO_NAMES, RerankerSettings, model_content

logger = logging.getLogger(__name__)

SAMPLE = 1000  # pairs whose tokens are counted
PART_FILE = "scored.jsonl"
WITHOUT_EFFECT = {"output", "overwrite", "trust_remote_code", "devices", *EngineOptions.model_fields}
QUESTION_KEYS = ("language", "system", "instruction", "prompt", "yes_token", "no_token")


class TeacherError(CommandFailure):
    """A teacher gave a score that is not finite."""


@dataclass(frozen=True)
class Part:
    """`records` records from `first` on, counted from 0, and the pairs in them."""

    first: int
    records: int
    pairs: int


def distill(config: DistillConfig) -> ScoreSummary:
    """Score the data's pairs with the teachers and write `output`; the same summary on every process.

    Under `accelerate launch` or torchrun every process calls it. What an interrupted run finished is used. Raises
    ValueError for a mistake in data, teachers or output (DataError names the lines), TeacherError for a score that is
    not finite, and RuntimeError on the other processes.
    """
    output = Path(config.output)
    folder = output.with_name(f"{output.name}.parts")
    with process_group(), ExitStack() as lock:  # which the main process alone takes
        made_from, parts = on_main(lambda: prepare(config, output, lock))
        arguments = {"config": config, "parts": parts, "planned": made_from["device"]}
        work = ShardWork("rag_retrieval.distill.run:open_teachers", arguments)
        shown = {"description": "scoring", "unit": "pairs"}
        pairs = [part.pairs for part in parts]
        shards = run_shards(folder, made_from, pairs, work, config, overwrite=config.overwrite, **shown)
        return on_main(lambda: finish(output, folder, list(zip(parts, shards, strict=True))))


def prepare(config: DistillConfig, output: Path, lock: ExitStack) -> tuple[dict, list[Part]]:
    """Check everything that can be checked without a teacher. Returns what the scores depend on, and the parts."""
    busy = f"output: another process is writing {output}; wait for it, or take another"
    lock.enter_context(locked(lock_file_of(output), busy))
    check_new_file(output, config.overwrite)
    if is_file(config.dataset) and checked_path(config.dataset).resolve() == output.resolve():
        raise ValueError(f"output: {output} is the dataset, whose other keys would be lost; take another output")
    parts = plan_parts(records(config), config.pairs_per_part)
    logger.info("%s: %s pairs in %d parts", config.dataset, f"{sum(part.pairs for part in parts):,}", len(parts))
    return described(config), parts


def plan_parts(records: Iterable[Record], pairs_per_part: int) -> list[Part]:
    """Parts of whole records, each closed as soon as it has `pairs_per_part` pairs."""
    parts, first, pairs, count = [], 0, 0, 0
    for count, record in enumerate(records, start=1):
        pairs += len(record.documents)
        if pairs >= pairs_per_part:
            parts.append(Part(first, count - first, pairs))
            first, pairs = count, 0
    if pairs:
        parts.append(Part(first, count - first, pairs))
    return parts


def records(config: DistillConfig) -> Iterator[Record]:
    return read_records(config.dataset, RecordRules(label_key=config.label_key), split=config.split)


def described(config: DistillConfig) -> dict:
    """What the scores depend on, as JSON values: the settings, with the content of files in place of their names."""
    run = config.model_dump(exclude=WITHOUT_EFFECT)
    run["device"] = config.device or own_device().type  # whose digits differ
    run["teachers"] = [f"{Path(name).name} {model_content(name)}" for name in config.teachers]
    if is_file(config.dataset):
        run["dataset"] = content_digest([Path(config.dataset)])
    else:
        run["dataset"] = f"{config.dataset} {load_hub_dataset(config.dataset, config.split)._fingerprint}"
    return run


def load_teachers(config: DistillConfig, device: torch.device) -> list[Reranker]:
    """Raises ValueError for a folder that is no teacher: damaged, without a trained head, without a chat template,
    or with a tokenizer that has no single token for an answer."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return [load_teacher(name, config, device) for name in config.teachers]


def load_teacher(name: str, config: DistillConfig, device: torch.device) -> Reranker:
    """A reranker as its folder says it is asked; any other language model is asked the configuration's question."""
    # what belongs to the question changes no teacher that has one of its own
    options = config.model_options(device).model_copy(update=dict.fromkeys(YES_NO_NAMES))
    try:
        backend = open_backend(name, options, config.question)
    except ValueError as error:
        raise ValueError(f"teachers: {error}") from error
    given = [key for key in QUESTION_KEYS if key in config.model_fields_set]
    if given and not (isinstance(backend, TorchBackend) and asks(backend.scorer.settings, config.question)):
        logger.warning("teacher %s: ignored %s; it brings its own question", name, ", ".join(given))
    return Reranker.from_backend(backend)


def asks(settings: RerankerSettings, question: Prompt) -> bool:
    """Whether a model is asked this question."""
    if any(getattr(settings, key) != getattr(question, key) for key in YES_NO_NAMES):
        return False
    before, after = settings.query_format.replace("{}", "{query}"), settings.document_format.replace("{}", "{document}")
    chat = before + settings.seq + after + settings.special_token
    return question.system in chat and question.user.strip() in chat  # a chat template may trim it


def mean_logits(teachers: list[Reranker], pairs: list[tuple[str, str]], batch_size: int) -> np.ndarray:
    """[pairs], float32. Raises TeacherError where a score is not finite."""
    scores = []
    for teacher in teachers:
        try:
            scores.append(teacher.compute_score(pairs, batch_size).astype(np.float64))
        except ValueError as error:
            first = f"in the pairs from the query {pairs[0][0][:60]!r} on"
            raise TeacherError(f"teacher {teacher.backend.name}, {first}: {error}") from error
    return np.mean(scores, axis=0).astype(np.float32)


def report_teachers(config: DistillConfig, teachers: list[Reranker]) -> None:
    """Say how each teacher scores, and how much of the first `SAMPLE` pairs it will not see."""
    all_pairs = ((one.query, document) for one in records(config) for document in one.documents)
    pairs = list(islice(all_pairs, SAMPLE))
    for teacher in teachers:
        logger.info("teacher %s: %s", teacher.backend.name, teacher.backend.describe())
        lengths = teacher.backend.pair_encoder.untruncated_lengths(pairs)
        if truncated := float((lengths > teacher.max_length).mean()):
            longer = f"{truncated:.1%} of the first {len(pairs):,} pairs are longer than {teacher.max_length} tokens"
            logger.warning("%s and are cut; max_length sets another limit", longer)


class PartReader:
    """The records of parts; of parts in rising order in one pass over the data."""

    def __init__(self, read: Callable[[], Iterator[Record]]):
        self.read, self.place, self.records = read, 0, read()

    def records_of(self, part: Part) -> list[Record]:
        if part.first < self.place:
            self.place, self.records = 0, self.read()
        skipped = part.first - self.place
        found = list(islice(self.records, skipped, skipped + part.records))
        self.place = part.first + part.records
        return found


def open_teachers(config: DistillConfig, parts: list[Part], planned: str) -> MakeShard:
    """Scores parts. Raises ValueError where a worker has another kind of device than was planned."""
    device = own_device()
    if config.device is None and device.type != planned:
        found = f"a worker computes on {device.type}, and the first process on {planned}, whose digits differ"
        raise ValueError(f"device: {found}; say device: {device.type}")
    teachers = load_teachers(config, device)
    report_teachers(config, teachers)
    reader = PartReader(lambda: records(config))

    def make(number: int, folder: Path) -> None:
        found = reader.records_of(parts[number])
        if len(found) != parts[number].records:
            raise DataError(f"{config.dataset}: changed while it was scored; restore it, or say overwrite: true")
        pairs = [(record.query, document) for record in found for document in record.documents]
        scores = iter(mean_logits(teachers, pairs, config.batch_size).tolist())
        lines = [scored_line(record, [next(scores) for _ in record.documents]) for record in found]
        (folder / PART_FILE).write_text("".join(lines), encoding="utf-8")

    return make


def finish(output: Path, folder: Path, parts: Sequence[tuple[Part, Path]]) -> ScoreSummary:
    """All parts one after another as the output, whole or not at all; then they are removed."""
    summary = ScoreSummary()
    with atomic_write(output) as temporary, temporary.open("wb") as file:
        for part, shard in parts:
            lines = (shard / PART_FILE).read_bytes().splitlines(keepends=True)
            try:
                found = [json.loads(line) for line in lines]
            except ValueError:
                found = []
            if len(found) != part.records:
                raise ValueError(
                    f"{shard / PART_FILE}: damaged, expected {part.records} records, a line for each; delete {shard}, "
                    "and the same command scores that part again"
                )
            for record in found:
                summary.add(record.get("hits") or [record])
            file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    ShardFolder(folder).remove()
    return summary
