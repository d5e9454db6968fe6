"""One distillation run: the data are read once to check and count them, then teachers score them part by part.

Teachers are rerankers, and causal language models that are asked yes or no. The score of several is the mean of their
logits: that of probabilities would lose what a sure teacher says about the order of documents, since sigmoid(9) and
sigmoid(12) are both nearly 1. A teacher whose logits are larger counts for more.

Every process reads all records and scores only its own parts; nothing but the plan is exchanged. A run that is killed
loses the parts in work, and may continue with another number of processes.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.core.distributed import on_all, on_main, own_device, process_count, process_group, process_index
from rag_retrieval.core.files import check_new_file, content_digest, lock_file_of, locked
from rag_retrieval.core.log import Progress
from rag_retrieval.data.readers import checked_path, is_file, load_hub_dataset, read_records
from rag_retrieval.data.records import Record, RecordRules
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.distill.output import ScoreSummary, scored_line
from rag_retrieval.distill.parts import Part, PartFolder, plan_parts, records_of
from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.infer.torch_backend import TorchBackend
from rag_retrieval.models.prompts import Prompt
from rag_retrieval.models.settings import YES_NO_NAMES, RerankerSettings, model_content

logger = logging.getLogger(__name__)

SAMPLE = 1000  # pairs whose tokens are counted
WITHOUT_EFFECT = {"output", "overwrite", "trust_remote_code", "devices"}
QUESTION_KEYS = ("language", "system", "instruction", "prompt", "yes_token", "no_token")


class TeacherError(CommandFailure):
    """A teacher gave a score that is not finite."""


def distill(config: DistillConfig) -> ScoreSummary:
    """Score the data's pairs with the teachers and write `output`; the same summary on every process.

    Under `accelerate launch` or torchrun every process calls it. What an interrupted run finished is used. Raises
    ValueError for a mistake in data, teachers or output (DataError names the lines), TeacherError for a score that is
    not finite, and RuntimeError on the other processes.
    """
    with process_group(), ExitStack() as lock:  # which the main process alone takes
        folder = PartFolder(Path(config.output))
        parts = on_main(lambda: prepare(config, folder, lock))
        teachers = on_all(lambda: load_teachers(config, own_device()))
        on_main(lambda: report_teachers(config, teachers))
        on_all(lambda: score_parts(config, folder, parts, teachers))  # the main process waits for the slowest
        return on_main(lambda: finish(folder, parts))


def prepare(config: DistillConfig, folder: PartFolder, lock: ExitStack) -> list[Part]:
    """Check everything that can be checked without a teacher, and take the folder of the parts."""
    busy = f"output: another process is writing {folder.output}; wait for it, or take another"
    lock.enter_context(locked(lock_file_of(folder.output), busy))
    check_new_file(folder.output, config.overwrite)
    if is_file(config.dataset) and checked_path(config.dataset).resolve() == folder.output.resolve():
        raise ValueError(f"output: {folder.output} is the dataset, whose other keys would be lost; take another output")
    run = described(config)
    parts = plan_parts(records(config), config.pairs_per_part)
    folder.begin(run, config.overwrite)
    done = sum(part.pairs for part in parts if folder.is_finished(part))
    logger.info("%s: %s pairs in %d parts, %s scored before",
                config.dataset, f"{sum(part.pairs for part in parts):,}", len(parts), f"{done:,}")  # fmt: skip
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


def score_parts(config: DistillConfig, folder: PartFolder, parts: list[Part], teachers: list[Reranker]) -> None:
    """Score this process's share of the parts that are missing, every n-th of them."""
    missing = on_main(lambda: [place for place, part in enumerate(parts) if not folder.is_finished(part)])
    own = [parts[place] for place in missing[process_index() :: process_count()]]
    main, waiting = process_index() == 0, list(parts)
    total, done = sum(part.pairs for part in parts), folder.take_finished(waiting)
    with Progress(total, "scoring", "pairs", done, shown=main) as progress:
        for part, part_records in records_of(own, records(config) if own else ()):
            pairs = [(record.query, document) for record in part_records for document in record.documents]
            scores = iter(mean_logits(teachers, pairs, config.batch_size).tolist())
            lines = [scored_line(record, [next(scores) for _ in record.documents]) for record in part_records]
            folder.write(part, lines)
            if main:  # what the other processes have finished is seen in the folder
                progress.update(folder.take_finished(waiting))


def finish(folder: PartFolder, parts: list[Part]) -> ScoreSummary:
    summary = ScoreSummary()
    for line in folder.lines(parts):
        record = json.loads(line)
        summary.add(record.get("hits") or [record])
    folder.finish(parts)
    return summary
