"""One training run from a validated configuration: data, model, trainer.

Data come before the model, so that a mistake in a file is reported before anything heavy is loaded.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed

from rag_retrieval.models.model_card import About, write_card
from rag_retrieval.models.packed_forward import attention_dropout
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.run_record import CONFIGURATION_FILE, DATA_FILE, summaries_to_write
from rag_retrieval.record_store import RecordStore, open_store
from rag_retrieval.record_summary import format_summary, summary
from rag_retrieval.train.checkpoints import TrainState, write_json
from rag_retrieval.train.launch import autocast_under_fsdp, build_accelerator, check_wrapped_layers
from rag_retrieval.train.loop import Trainer
from rag_retrieval.train.provenance import Provenance
from rag_retrieval.train.reranker.model_setup import (
    describe_parameters,
    load_scorer,
    make_optimizer,
    prepare_for_training,
)
from rag_retrieval.train.reranker.objective import Objective, WeightedLoss, configured_objective
from rag_retrieval.train.reranker.reranker_task import RerankerTask
from rag_retrieval.train.reranker.resume_checks import checked_resume, provenance
from rag_retrieval.train.reranker.training_config import TrainingConfig
from rag_retrieval.train.reranker.training_data import SamplingOptions, TrainingSteps
from rag_retrieval.train.reranker.validation import Validation
from rag_retrieval.train.run_folder import RESULTS, claim, folder_lock, plan_start, take_lock
from rag_retrieval.train.starting import StartError, mistakes_told, on_all_processes, on_main_process
from rag_retrieval.train.step_data import StepShape
from rag_retrieval.train.task import LoopSettings

logger = logging.getLogger(__name__)

# of a forward pass on a CPU: enough to keep its cores busy; padded, little enough to waste no padding
CPU_PACKED_TOKENS, CPU_PADDED_TOKENS = 2048, 1024
# The summary's token lengths are of so many pairs at most, and of fewer where these have more text than one core
# tokenizes in about a second: 10,000 pairs of 500 characters each took 4 of the 10 seconds before the first step.
LENGTH_SAMPLE, LEAST_SAMPLE = 10_000, 1_000  # pairs
SAMPLE_BYTES = 2_000_000


def run(config: TrainingConfig) -> TrainState | None:
    """Train as configured. Returns the final state, or None when `resume: auto` found the run finished.

    Raises StartError for a mistake found before the first step, LaunchError for one of the launcher's settings,
    TrainingError where training cannot go on, TrainingStopped where a signal ended it. The output folder belongs to
    one run at a time on a machine: a second one gets a StartError.
    """
    output_dir = Path(config.output_dir)
    with mistakes_told():
        accelerator = build_accelerator(
            config.mixed_precision,
            config.log_with,
            output_dir,
            config.batch_size,
            config.gradient_accumulation_steps,
            config.max_grad_norm,
        )
        lock = folder_lock(output_dir)
        on_main_process(accelerator, take_lock, lock, output_dir)
    try:
        with mistakes_told():
            trainer = prepare(config, accelerator, output_dir)
        if trainer is None:
            return None
        state = trainer.train()
    finally:
        lock.release()
    if accelerator.is_main_process:
        write_card(output_dir / "model", output_dir, About(output_dir.resolve().name))
    logger.info("done: %s", output_dir / "model")
    accelerator.end_training()
    return state


def prepare(config: TrainingConfig, accelerator: Accelerator, output_dir: Path) -> Trainer | None:
    """The trainer, brought to where the run begins or goes on; None where it is finished."""
    check_model_is_kept(config)
    start = on_main_process(accelerator, plan_start, output_dir, config.resume, config.overwrite_output_dir)
    if start is None:
        logger.info("%s: this run is finished; nothing to resume", output_dir)
        return None
    state, checkpoint = start
    objective = configured_objective(config)
    train_store, val_store = on_all_processes(open_stores, config, objective)
    on_all_processes(check_teachable, config, objective, train_store)
    origin = on_main_process(accelerator, provenance, config, accelerator, train_store, val_store)
    if checkpoint is not None:
        state = on_main_process(accelerator, checked_resume, state, checkpoint, origin, config.resume_with_changes)
    set_seed(config.seed)
    scorer = on_all_processes(load_scorer, config)
    check_wrapped_layers(scorer.model)
    adapter = on_all_processes(prepare_for_training, scorer, config)
    if accelerator.is_main_process:
        report_data(config, train_store, val_store, scorer)
    trainer = build_trainer(config, accelerator, objective, train_store, val_store, scorer, adapter, state, origin)
    stores = {"train_dataset": train_store, "val_dataset": val_store}
    on_main_process(accelerator, take_folder, config, output_dir, state, stores, origin)
    set_seed(config.seed, device_specific=True)  # other dropout masks on every process
    if checkpoint is not None:
        logger.info("resuming from %s, step %d", checkpoint, state.step)
        trainer.load_checkpoint(checkpoint)
    return trainer


def take_folder(
    config: TrainingConfig,
    output_dir: Path,
    state: TrainState,
    stores: dict[str, RecordStore | None],
    origin: Provenance,
) -> None:
    """The folder is the run's from now on, and holds what the model's card tells of configuration and data."""
    claim(output_dir, state)
    config.save(output_dir / CONFIGURATION_FILE)
    origin.save(output_dir)
    summaries = {key: summary(store) for key, store in stores.items() if store is not None}
    write_json(output_dir / DATA_FILE, summaries_to_write(summaries))


def check_model_is_kept(config: TrainingConfig) -> None:
    """Raises StartError when the model to start from is a result of the run that is to be overwritten."""
    model, output_dir = Path(config.model_name_or_path).resolve(), Path(config.output_dir).resolve()
    if config.overwrite_output_dir and model != output_dir and model.is_relative_to(output_dir):
        folder = model.relative_to(output_dir).parts[0]
        if folder in RESULTS or folder.startswith("checkpoint-"):
            raise StartError(
                f"model_name_or_path: {model} is a result of the run in output_dir, which "
                "overwrite_output_dir removes; take another output_dir"
            )


def open_stores(config: TrainingConfig, objective: Objective) -> tuple[RecordStore, RecordStore | None]:
    """The memory-mapped training and validation data; one process of a machine builds what is missing."""
    common = {
        "min_label": config.min_label,
        "max_label": config.max_label,
        "teacher_key": config.teacher_score_key,
        "teacher_range": objective.teacher_range,
    }
    train = open_store(
        config.train_dataset,
        split=config.train_split or "train",
        label_key=config.train_label_key,
        group_by_query=True,  # pointwise steps keep the pairs of a query together too
        exactly_one_positive=objective.one_positive,
        needs_teacher=objective.needs_teacher,
        **common,
    )
    if config.val_dataset is None:
        return train, None
    validation = open_store(
        config.val_dataset,
        split=config.val_split or "validation",
        label_key=config.val_label_key,
        group_by_query=True,  # ranking metrics need the pairs of a query together
        **common,
    )
    return train, validation


def check_teachable(config: TrainingConfig, objective: Objective, train: RecordStore) -> None:
    """Groups in which all labels are equal (one document, too) teach a loss on labels nothing, and groups of one
    document no grouped loss anything: they are reported, and data that hold nothing else are refused."""
    for weighted in objective.losses if objective.grouped else ():
        check_groups(config, weighted, train)


def check_groups(config: TrainingConfig, weighted: WeightedLoss, train: RecordStore) -> None:
    groups, name = train.num_groups, weighted.loss.name
    if weighted.from_teacher:
        count, fault, remedy = int((train.group_sizes == 1).sum()), "one document alone", "several documents"
    else:
        count, fault = summary(train).equal_label_groups, "documents of one label only"
        remedy = "documents of different labels"
    idle = f"{count:,} of {groups:,} groups have {fault}"
    if count == groups:
        raise StartError(
            f"train_dataset: {config.train_dataset}: {idle}, so {name} has nothing to learn; give each "
            f"query {remedy}, or use a pointwise loss"
        )
    if count:
        logger.warning("%s: they teach %s nothing", idle, name)


def report_data(
    config: TrainingConfig, train: RecordStore, validation: RecordStore | None, scorer: PairScorer
) -> None:
    sources = (
        ("training data", config.train_dataset, train),
        ("validation data", config.val_dataset, validation),
    )
    for name, source, store in sources:
        if store is not None:
            lengths, sampled = token_lengths(store, scorer)
            title = f"{name}: {source}"
            text = format_summary(
                summary(store), title, token_lengths=lengths, max_len=config.max_len, sampled=sampled
            )
            logger.info("%s", text)


def token_lengths(store: RecordStore, scorer: PairScorer) -> tuple[np.ndarray, bool]:
    """Lengths in tokens, before truncation, of all pairs or of an evenly spread sample of them."""
    count = sample_size(store.num_pairs, store.meta["bytes"]["pairs.arrow"])
    places = np.linspace(0, store.num_pairs - 1, count).astype(int)
    encoder = scorer.pair_encoder
    pairs = [store.pair(int(place)) for place in places]
    queries = encoder.query_ids([pair.query for pair in pairs])
    documents = encoder.document_ids([pair.document for pair in pairs])
    lengths = [encoder.untruncated_length(*ids) for ids in zip(queries, documents, strict=True)]
    return np.array(lengths), count < store.num_pairs


def sample_size(pairs: int, size: int) -> int:
    """How many of `pairs` pairs, whose documents and numbers take `size` bytes, the token lengths are counted of."""
    affordable = pairs * SAMPLE_BYTES // size
    return min(pairs, LENGTH_SAMPLE, max(affordable, LEAST_SAMPLE))


def build_trainer(
    config: TrainingConfig,
    accelerator: Accelerator,
    objective: Objective,
    train: RecordStore,
    validation: RecordStore | None,
    scorer: PairScorer,
    adapter,
    state: TrainState,
    origin: Provenance,
) -> Trainer:
    scorer.to(accelerator.device)
    autocast_under_fsdp(accelerator, scorer)
    optimizer = make_optimizer(scorer, config)
    logger.info("%s", describe_parameters(scorer))
    shape = StepShape(
        records=train.num_groups if objective.grouped else train.num_pairs,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    with accelerator.autocast():  # on a GPU, packing takes half precision
        packs, shares_queries = scorer.packs, scorer.shares_queries
    report_layout(scorer, packs)
    max_tokens = config.max_tokens_per_batch
    if max_tokens is None and accelerator.device.type == "cpu":
        max_tokens = CPU_PACKED_TOKENS if packs else CPU_PADDED_TOKENS
    options = SamplingOptions(
        config.seed,
        config.train_group_size,
        config.min_label,
        config.max_label,
        config.shuffle_rate,
        max_tokens,
        padded=not packs,
        shares_queries=shares_queries,
    )
    steps = TrainingSteps(train, config.train_dataset, scorer.pair_encoder, objective, shape, options)
    evaluate = build_validation(config, accelerator, objective, validation, scorer)
    task = RerankerTask(scorer, objective, evaluate, partial(load_scorer, config), adapter)
    settings = loop_settings(config, evaluate)
    return Trainer(accelerator, scorer, optimizer, steps, task, settings, Path(config.output_dir), state, origin)


def report_layout(scorer: PairScorer, packs: bool) -> None:
    if not packs:
        reason = scorer.packing_problem or "no kernel for variable lengths in this precision on this device"
        logger.info("batches are padded: %s", reason)
        return
    rate = attention_dropout(scorer.model)
    note = f"; the attention dropout of {rate} in its config is not applied" if rate else ""
    logger.info("batches are packed, without padding%s", note)


def build_validation(
    config: TrainingConfig,
    accelerator: Accelerator,
    objective: Objective,
    store: RecordStore | None,
    scorer: PairScorer,
) -> Validation | None:
    if store is None:
        return None
    pairs_per_batch = config.batch_size * (config.train_group_size or 1)
    label_range = (config.min_label, config.max_label)
    return Validation(store, scorer.pair_encoder, objective, label_range, pairs_per_batch, accelerator)


def loop_settings(config: TrainingConfig, validation: Validation | None) -> LoopSettings:
    settings = LoopSettings(**{name: getattr(config, name) for name in LoopSettings.__dataclass_fields__})
    metric = config.metric_for_best_model
    if validation is None or metric in validation.metrics:
        return settings
    if validation.lacks_teacher:
        raise StartError(
            f"val_dataset: {config.val_dataset}: some document has no {config.teacher_score_key}, so that the "
            f"validation loss, for metric_for_best_model {metric}, cannot be measured; give every document one, or "
            "take a ranking metric that the data allow"
        )
    if "loss" not in validation.metrics:
        raise StartError(
            f"val_dataset: {config.val_dataset} measures nothing: no group has documents of different labels; "
            "give documents that are relevant and documents that are not"
        )
    logger.warning(
        "metric_for_best_model: %s cannot be measured on %s, where no query has several documents with a "
        "relevant one among them; the validation loss decides which checkpoint is best",
        metric,
        config.val_dataset,
    )
    return replace(settings, metric_for_best_model="loss")
