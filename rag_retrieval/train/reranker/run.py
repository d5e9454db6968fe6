"""One training run from a validated configuration: data, model, trainer.

Data come before the model, so that a mistake in a file is reported before anything heavy is loaded.
"""

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from rag_retrieval.core.distributed import StartError, on_all, on_main, user_errors_to_start_error
from rag_retrieval.core.files import write_json
from rag_retrieval.data.store import RecordStore
from rag_retrieval.metrics import LOGGED_METRICS
from rag_retrieval.models.model_card import About, write_card
from rag_retrieval.models.packed_model import attention_dropout
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.run_record import DataPart, parts_to_write
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.launch import autocast_under_fsdp, build_accelerator, check_wrapped_layers
from rag_retrieval.train.loop import Trainer
from rag_retrieval.train.provenance import Provenance
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.model_setup import (
    describe_parameters,
    load_scorer,
    make_optimizer,
    prepare_for_training,
)
from rag_retrieval.train.reranker.objective import configured_objective
from rag_retrieval.train.reranker.reranker_task import RerankerTask
from rag_retrieval.train.reranker.resume_checks import checked_resume, provenance
from rag_retrieval.train.reranker.run_data import (
    TrainingFile,
    data_parts,
    open_training_files,
    open_validation,
    report_data,
    report_mix,
)
from rag_retrieval.train.reranker.training_data import SamplingOptions, TrainingSteps
from rag_retrieval.train.reranker.validation import Validation
from rag_retrieval.train.resume import claim, plan_start
from rag_retrieval.train.run_folder import CONFIGURATION_FILE, DATA_FILE, RESULTS, folder_lock
from rag_retrieval.train.steps import MixedSteps, StepShape
from rag_retrieval.train.task import LoopSettings

logger = logging.getLogger(__name__)

# of a forward pass on a CPU: enough to keep its cores busy; padded, little enough to waste no padding
CPU_PACKED_TOKENS, CPU_PADDED_TOKENS = 2048, 1024


def run(config: RerankerConfig) -> TrainState | None:
    """Train as configured. Returns the final state, or None when `resume: auto` found the run finished.

    Raises StartError for a mistake found before the first step, LaunchError for one of the launcher's settings,
    TrainingError where training cannot go on, TrainingStopped where a signal ended it, PeerError where another process
    failed before the first step. The output folder belongs to one run at a time: a second one gets a StartError.
    """
    output_dir = Path(config.output_dir)
    with user_errors_to_start_error():
        accelerator = build_accelerator(
            config.mixed_precision,
            config.log_with,
            output_dir,
            config.batch_size,
            config.gradient_accumulation_steps,
            config.max_grad_norm,
        )
    with ExitStack() as lock:  # which the main process alone takes
        with user_errors_to_start_error():
            on_main(lambda: lock.enter_context(folder_lock(output_dir)))
            trainer = prepare(config, accelerator, output_dir)
        if trainer is None:
            return None
        state = trainer.train()
    if accelerator.is_main_process:
        write_card(output_dir / "model", output_dir, About(output_dir.resolve().name))
    logger.info("done: %s", output_dir / "model")
    accelerator.end_training()
    return state


def prepare(config: RerankerConfig, accelerator: Accelerator, output_dir: Path) -> Trainer | None:
    """The trainer, brought to where the run begins or goes on; None where it is finished."""
    check_model_is_kept(config)
    start = on_main(lambda: plan_start(output_dir, config.resume, config.overwrite_output_dir))
    if start is None:
        logger.info("%s: this run is finished; nothing to resume", output_dir)
        return None
    state, checkpoint = start
    files = on_all(lambda: open_training_files(config))
    val_store = on_all(lambda: open_validation(config))
    stores = [file.store for file in files]
    origin = on_main(lambda: provenance(config, accelerator, stores, val_store))
    if checkpoint is not None:
        state = on_main(lambda: checked_resume(state, checkpoint, origin, config.resume_with_changes))
    set_seed(config.seed)
    scorer = on_all(lambda: load_scorer(config))
    check_wrapped_layers(scorer.model)
    adapter = on_all(lambda: prepare_for_training(scorer, config))
    if accelerator.is_main_process:
        report_data(config, files, val_store, scorer)
    trainer = build_trainer(config, accelerator, files, val_store, scorer, adapter, state, origin)
    parts = data_parts(config, files, val_store)
    on_main(lambda: take_folder(config, output_dir, state, parts, origin))
    set_seed(config.seed, device_specific=True)  # other dropout masks on every process
    if checkpoint is not None:
        logger.info("resuming from %s, step %d", checkpoint, state.step)
        trainer.load_checkpoint(checkpoint)
    return trainer


def take_folder(
    config: RerankerConfig, output_dir: Path, state: TrainState, parts: list[DataPart], origin: Provenance
) -> None:
    """The folder is the run's from now on, and holds what the model's card tells of configuration and data."""
    claim(output_dir, state)
    config.save(output_dir / CONFIGURATION_FILE)
    origin.save(output_dir)
    write_json(output_dir / DATA_FILE, parts_to_write(parts))


def check_model_is_kept(config: RerankerConfig) -> None:
    """Raises StartError when the model to start from is a result of the run that is to be overwritten."""
    model, output_dir = Path(config.model_name_or_path).resolve(), Path(config.output_dir).resolve()
    if config.overwrite_output_dir and model != output_dir and model.is_relative_to(output_dir):
        folder = model.relative_to(output_dir).parts[0]
        if folder in RESULTS or folder.startswith("checkpoint-"):
            raise StartError(
                f"model_name_or_path: {model} is a result of the run in output_dir, which "
                "overwrite_output_dir removes; take another output_dir"
            )


def build_trainer(
    config: RerankerConfig,
    accelerator: Accelerator,
    files: list[TrainingFile],
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
    steps = build_steps(config, accelerator, files, scorer)
    evaluate = build_validation(config, accelerator, validation, scorer)
    objectives = {file.name: file.objective for file in files}
    task = RerankerTask(scorer, objectives, evaluate, partial(load_scorer, config), adapter)
    settings = loop_settings(config, evaluate)
    return Trainer(accelerator, scorer, optimizer, steps, task, settings, Path(config.output_dir), state, origin)


def build_steps(
    config: RerankerConfig, accelerator: Accelerator, files: list[TrainingFile], scorer: PairScorer
) -> MixedSteps:
    """The steps of all files, in turns. Each file draws random numbers of its own, the first those of the seed."""
    with accelerator.autocast():  # on a GPU, packing takes half precision
        packs, shares_queries = scorer.packs, scorer.shares_queries
    report_layout(scorer, packs)
    max_tokens = config.max_tokens_per_batch
    if max_tokens is None and accelerator.device.type == "cpu":
        max_tokens = CPU_PACKED_TOKENS if packs else CPU_PADDED_TOKENS
    sets = {}
    for position, file in enumerate(files):
        shape = StepShape(
            records=file.records_per_epoch,
            batch_size=file.config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
        alone = file.config
        options = SamplingOptions(
            config.seed + position,
            alone.train_group_size,
            alone.min_label,
            alone.max_label,
            config.shuffle_rate,
            max_tokens,
            padded=not packs,
            shares_queries=shares_queries,
        )
        source, encoder = alone.train_dataset, scorer.pair_encoder
        sets[file.name] = TrainingSteps(file.store, source, encoder, file.objective, shape, options, file.name)
    steps = MixedSteps(sets)
    report_mix(files, steps)
    return steps


def report_layout(scorer: PairScorer, packs: bool) -> None:
    if not packs:
        reason = scorer.packing_problem or "no kernel for variable lengths in this precision on this device"
        logger.info("batches are padded: %s", reason)
        return
    rate = attention_dropout(scorer.model)
    note = f"; the attention dropout of {rate} in its config is not applied" if rate else ""
    logger.info("batches are packed, without padding%s", note)


def build_validation(
    config: RerankerConfig,
    accelerator: Accelerator,
    store: RecordStore | None,
    scorer: PairScorer,
) -> Validation | None:
    if store is None:
        return None
    pairs_per_batch = config.batch_size * (config.train_group_size or 1)
    label_range = (config.min_label, config.max_label)
    objective = configured_objective(config)
    chosen = config.metric_for_best_model
    names = [*LOGGED_METRICS, *([chosen] if chosen not in ("loss", "pair_accuracy", *LOGGED_METRICS) else [])]
    return Validation(store, scorer.pair_encoder, objective, label_range, pairs_per_batch, accelerator, names)


def loop_settings(config: RerankerConfig, validation: Validation | None) -> LoopSettings:
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
