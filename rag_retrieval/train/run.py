"""One training run, of whatever trainer: lock, start or resume, data, model, loop, card.

Data come before the model, so that a mistake in a file is reported before anything heavy is loaded.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from rag_retrieval.core.distributed import StartError, on_all, on_main, user_errors_to_start_error
from rag_retrieval.core.files import content_digest, write_json
from rag_retrieval.data.store import RecordStore
from rag_retrieval.data.summary import TokenLengths
from rag_retrieval.train.card import About, Kind, write_card
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.launch import autocast_under_fsdp, build_accelerator, check_wrapped_layers
from rag_retrieval.train.loop import Trainer
from rag_retrieval.train.resume import checked_resume, claim, file_keys, plan_start
from rag_retrieval.train.run_data import DataSource, data_parts, report_data
from rag_retrieval.train.run_folder import (
    CONFIGURATION_FILE,
    DATA_FILE,
    RESULTS,
    Provenance,
    engine_of,
    folder_lock,
    library_versions,
)
from rag_retrieval.train.setup import describe_parameters, make_optimizer, prepare_for_training
from rag_retrieval.train.steps import MixedSteps
from rag_retrieval.train.task import Task

logger = logging.getLogger(__name__)


class Training(Protocol):
    """What a trainer brings: its data, its model and its task. Made from a configuration, for one run."""

    config: TrainingConfig
    card: Kind

    def open_data(self) -> list[DataSource]:
        """Open and check the data, the training files in the order of the configuration, validation last. On every
        process; raises ValueError."""

    def load_model(self) -> Any:
        """The module that is trained, with the attributes that `train.setup` names. On every process."""

    def token_lengths(self, store: RecordStore, model: Any) -> list[TokenLengths]:
        """Of the texts of a store, for the log."""

    def steps(self, model: Any, accelerator: Accelerator) -> MixedSteps: ...

    def task(self, model: Any, adapter: Any, accelerator: Accelerator) -> tuple[Task, str | None]:
        """The task, and the metric that decides which checkpoint is best; None without validation."""


def run(training: Training) -> TrainState | None:
    """Train as configured. Returns the final state, or None when `resume: auto` found the run finished.

    Raises StartError for a mistake found before the first step, LaunchError for one of the launcher's settings,
    TrainingError where training cannot continue, TrainingStopped where a signal ended it, PeerError where another
    process failed before the first step. The output folder is one run's at a time: a second one gets a StartError.
    """
    config, output_dir = training.config, Path(training.config.output_dir)
    try:
        with user_errors_to_start_error():
            accelerator = build_accelerator(config)
        with ExitStack() as lock:  # which the main process alone takes
            with user_errors_to_start_error():
                on_main(lambda: lock.enter_context(folder_lock(output_dir)))
                trainer = prepare(training, accelerator, output_dir)
            if trainer is None:
                return None
            state = trainer.train()
            if accelerator.is_main_process:
                write_card(output_dir / "model", output_dir, About(output_dir.resolve().name), training.card)
        logger.info("done: %s", output_dir / "model")
        accelerator.end_training()
        return state
    finally:
        AcceleratorState._reset_state()  # a later run in this process, in a notebook say, may have another precision


def prepare(training: Training, accelerator: Accelerator, output_dir: Path) -> Trainer | None:
    """The trainer, at the run's beginning or at its checkpoint; None where the run is finished."""
    config = training.config
    check_model_is_kept(config)
    start = on_main(lambda: plan_start(output_dir, config.resume, config.overwrite_output_dir))
    if start is None:
        logger.info("%s: this run is finished; nothing to resume", output_dir)
        return None
    state, checkpoint = start
    sources = on_all(training.open_data)
    origin = on_main(lambda: provenance(config, sources, accelerator))
    if checkpoint is not None:
        state = on_main(lambda: checked_resume(state, checkpoint, origin, type(config), config.resume_with_changes))
    set_seed(config.seed)
    model = on_all(training.load_model)
    check_wrapped_layers(model.model)
    adapter = on_all(lambda: prepare_for_training(model, config, accelerator))
    if accelerator.is_main_process:
        report_data(sources, lambda store: training.token_lengths(store, model))
    trainer = build_trainer(training, accelerator, model, adapter, state, origin)
    on_main(lambda: take_folder(config, sources, output_dir, state, origin))
    set_seed(config.seed, device_specific=True)  # other dropout masks on every process
    if checkpoint is not None:
        logger.info("resuming from %s, step %d", checkpoint, state.step)
        trainer.saver.load(checkpoint)
    return trainer


def provenance(config: TrainingConfig, sources: Sequence[DataSource], accelerator: Accelerator) -> Provenance:
    """What the run's checkpoints record of it."""
    keys = [*file_keys(sum(source.purpose == "training" for source in sources)), "val_dataset"]
    digests = {key: content_digest(source.files) for key, source in zip(keys, sources, strict=False)}
    engine, processes = engine_of(accelerator), accelerator.num_processes
    return Provenance(config.model_dump(), digests, engine, processes, library_versions())


def build_trainer(
    training: Training, accelerator: Accelerator, model: Any, adapter: Any, state: TrainState, origin: Provenance
) -> Trainer:
    config = training.config
    model.to(accelerator.device)
    autocast_under_fsdp(accelerator, model)
    optimizer = make_optimizer(model, config)
    logger.info("%s", describe_parameters(model))
    steps = training.steps(model, accelerator)
    task, metric = training.task(model, adapter, accelerator)
    on_main(task.rehearse)
    return Trainer(accelerator, model, optimizer, steps, task, config, metric, state, origin)


def take_folder(
    config: TrainingConfig, sources: Sequence[DataSource], output_dir: Path, state: TrainState, origin: Provenance
) -> None:
    """The folder is the run's from now on, and holds what the model's card says of configuration and data."""
    claim(output_dir, state)
    config.save(output_dir / CONFIGURATION_FILE)
    origin.save(output_dir)
    write_json(output_dir / DATA_FILE, [asdict(part) for part in data_parts(sources)])


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
