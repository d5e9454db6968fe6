"""The sides that `speed.py` compares, each driven through its own real training loop or scoring call.

Every call builds its side afresh from the model's folder, takes `WARMUP` steps that are not timed, then those that
are, and leaves nothing behind. All sides get the pairs that our own sampler drew for a step, so that lengths are
equal and its handling alone differs.
"""

import gc
import json
import random
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from quality_trainers import GroupCrossEntropy, as_dataset
from speed_data import Example, Formats, text_pairs
from speed_floor import now
from torch import nn

PAIRS_PER_STEP = 32
LR, WEIGHT_DECAY, MAX_GRAD_NORM = 5e-5, 0.01, 1.0  # the rate is constant
WARMUP = 1  # optimizer steps before the clock starts
SEED = 0
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Job:
    """What all sides of a work share. `file` holds the examples, `steps` what each optimizer step takes of them
    (filled by `plan_steps`). formats: None for an encoder. dtype: float32 or bf16 (training: autocast; scoring:
    the weights'). workers: loading processes of each side."""

    model: Path
    file: Path
    examples: list[Example]
    formats: Formats | None
    max_len: int
    dtype: str
    device: str
    workers: int
    scratch: Path
    steps: list[list[Example]] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Of an example."""
        return len(self.examples[0].documents)

    @property
    def grouped(self) -> bool:
        return self.documents > 1


@dataclass(frozen=True)
class Took:
    """seconds: wall time. cpu_seconds: of all threads of this process. peak_bytes: of the GPU's memory, or None."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


class EnoughSteps(Exception):
    """Ends our training loop after the last step of interest, before it writes a model."""


class StepClock:
    """Times `steps` optimizer steps after the first `WARMUP`; the loop calls `step_done` after each.

    Between two of its marks lies all that a loop does: loading and tokenizing too. The GPU is waited for at the
    first and the last mark alone.
    """

    def __init__(self, steps: int, device: str):
        self.steps, self.device, self.done = steps, device, 0
        self.marks: list[tuple[float, float]] = []
        empty_memory(device)

    def step_done(self) -> None:
        self.done += 1
        if self.done in (WARMUP, WARMUP + self.steps):
            self.marks.append((now(self.device), time.process_time()))

    @property
    def finished(self) -> bool:
        return len(self.marks) == 2

    def took(self) -> Took:
        assert self.finished, f"{self.done} steps were taken"
        (wall, cpu), (wall_end, cpu_end) = self.marks
        return Took(wall_end - wall, cpu_end - cpu, peak_bytes(self.device))


def peak_bytes(device: str) -> int | None:
    """Since `empty_memory`, what stands there by then included."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def empty_memory(device: str) -> None:
    """Free what an earlier side left, and reset the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- training: ours ---


def train_ours(job: Job, first: int, steps: int) -> Took:
    """The real loop from optimizer step `first` on, ended by an exception out of its last step."""
    clock = StepClock(steps, job.device)
    run_ours(our_trainer(job, first, Path(tempfile.mkdtemp(dir=job.scratch))), clock)
    return clock.took()


def our_losses(job: Job, steps: int) -> list[float]:
    """The loss of each of the first steps, from the run's own metrics file."""
    folder = Path(tempfile.mkdtemp(dir=job.scratch))
    # a step is logged after the clock has counted it, so the loop is left one step later
    run_ours(our_trainer(job, 0, folder, log_interval=1), StepClock(steps + 1 - WARMUP, job.device))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run_ours(trainer, clock: StepClock) -> None:
    take_step = trainer.train_step

    def timed_step(micro_batches):
        take_step(micro_batches)
        clock.step_done()
        if clock.finished:
            raise EnoughSteps

    trainer.train_step = timed_step
    with suppress(EnoughSteps):
        trainer.train()


def our_trainer(job: Job, first: int, output_dir: Path, log_interval: int = 10):
    from rag_retrieval.train.reranker.run import RerankerTraining

    return trainer_at(RerankerTraining(our_config(job, output_dir, log_interval)), first)


def trainer_at(training, first: int):
    """The trainer that `rag_retrieval.train.run` builds, about to take optimizer step `first`."""
    from accelerate.state import AcceleratorState
    from transformers import set_seed

    from rag_retrieval.train.checkpoints import TrainState
    from rag_retrieval.train.launch import build_accelerator
    from rag_retrieval.train.run import build_trainer, provenance
    from rag_retrieval.train.setup import prepare_for_training

    AcceleratorState._reset_state(reset_partial_state=True)  # else it keeps the precision of an earlier run
    accelerator = build_accelerator(training.config)
    sources = training.open_data()
    set_seed(training.config.seed)
    model = training.load_model()
    adapter = prepare_for_training(model, training.config, accelerator)
    state = TrainState("speed", step=first)
    origin = provenance(training.config, sources, accelerator)
    return build_trainer(training, accelerator, model, adapter, state, origin)


def our_config(job: Job, output_dir: Path, log_interval: int):
    from rag_retrieval.train.reranker.config import RerankerConfig

    values = {
        "model_name_or_path": str(job.model),
        "model_type": "llm_decoder" if job.formats else "bert_encoder",
        "max_len": job.max_len,
        "train_dataset": str(job.file),
        "train_dataset_type": "grouped" if job.grouped else "pointwise",
        "loss_type": "listwise_ce" if job.grouped else "point_ce",
        "output_dir": str(output_dir),
        "batch_size": PAIRS_PER_STEP // job.documents,
        "log_interval": log_interval,
    }
    values |= our_settings(job)
    grouped = {"train_group_size": job.documents} if job.grouped else {}
    return RerankerConfig(**values | grouped | (job.formats._asdict() if job.formats else {}))


def our_settings(job: Job) -> dict:
    """Of any trainer of ours."""
    return {
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "warmup_proportion": 0.0,
        "stable_proportion": 1.0,
        "mixed_precision": "bf16" if job.dtype == "bf16" else "no",
        "num_workers": job.workers,
        "seed": SEED,
    }


def plan_steps(job: Job) -> float:
    """Fill `job.steps` with what our sampler puts into each step; returns the mean seconds that our dataset takes
    to tokenize and plan one (the first, which starts the tokenizer, left out).

    A step's examples are shuffled: our plan sorts them by length, and other sides would pad less by our work.
    """
    numbers = random.Random(SEED)
    steps = our_trainer(job, 0, Path(tempfile.mkdtemp(dir=job.scratch))).dataset
    seconds = []
    for step in range(steps.steps_per_epoch):
        started = time.perf_counter()
        micro_batches = steps[0, step]
        seconds.append(time.perf_counter() - started)
        lines = [int(source.rpartition(":")[2]) for batch in micro_batches for source in batch.sources]
        numbers.shuffle(lines)
        job.steps.append([job.examples[line - 1] for line in lines])
    return sum(seconds[1:]) / len(seconds[1:])


# --- training: the others ---


def train_sentence_transformers(job: Job, first: int, steps: int, batch: int) -> Took:
    """CrossEncoderTrainer; `batch` pairs at once and as many accumulated batches as make an optimizer step."""
    clock = StepClock(steps, job.device)
    their_trainer(job, first, WARMUP + steps, batch, clock)[0].train()
    return clock.took()


def their_losses(job: Job, steps: int) -> list[float]:
    """The mean loss of each of the first steps, over batches small enough for any memory."""
    batch = max(8, job.documents)
    trainer, losses = their_trainer(job, 0, steps, batch, StepClock(steps, job.device))
    trainer.train()
    return torch.stack(losses).view(steps, PAIRS_PER_STEP // batch).mean(1).tolist()


def their_trainer(job: Job, first: int, steps: int, batch: int, clock: StepClock):
    """The trainer, and the list to which each of its forward passes will add a loss."""
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses
    from transformers import PrinterCallback

    model = their_model(job, torch.float32)
    settings = CrossEncoderTrainingArguments(
        per_device_train_batch_size=batch // job.documents,
        gradient_accumulation_steps=PAIRS_PER_STEP // batch,
        logging_steps=10,
        **their_settings(job, steps),
    )
    loss = GroupCrossEntropy(model) if job.grouped else losses.BinaryCrossEntropyLoss(model)
    values = []
    loss.register_forward_hook(lambda module, inputs, value: values.append(value.detach()))
    rows = as_dataset(their_rows(job, first, steps))
    trainer = CrossEncoderTrainer(model=model, args=settings, train_dataset=rows, loss=loss, callbacks=[marks(clock)])
    trainer.remove_callback(PrinterCallback)
    return trainer, values


def their_settings(job: Job, steps: int) -> dict:
    """Of any trainer of theirs."""
    return {
        "output_dir": str(job.scratch / "theirs"),
        "max_steps": steps,
        "batch_sampler": in_order,
        "learning_rate": LR,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": SEED,
        "bf16": job.dtype == "bf16",
        "use_cpu": job.device == "cpu",  # else transformers refuses bf16 without a GPU
        "dataloader_num_workers": job.workers,
        "dataloader_pin_memory": job.device == "cuda",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def marks(clock: StepClock):
    """A callback that tells the clock of each step."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step_done()

    return Marks()


def in_order(dataset, batch_size: int, drop_last: bool, **options):
    """The batch sampler of a trainer that takes its rows as they stand."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last, **options)


def their_model(job: Job, dtype: torch.dtype):
    from sentence_transformers.cross_encoder import CrossEncoder

    return CrossEncoder(
        str(job.model),
        max_length=job.max_len,
        activation_fn=nn.Identity(),
        device=job.device,
        model_kwargs={"dtype": dtype},
    )


def their_rows(job: Job, first: int, steps: int) -> list[dict]:
    """The columns that the loss expects: a document and its label, or all documents and labels of a group."""
    rows = []
    for example in sum(job.steps[first : first + steps], []):
        pairs = text_pairs([example], job.formats)
        if job.grouped:
            documents = [document for _, document in pairs]
            rows.append({"query": pairs[0][0], "documents": documents, "labels": example.labels})
        else:
            rows.append({"query": pairs[0][0], "document": pairs[0][1], "label": example.labels[0]})
    return rows


def train_plain(job: Job, first: int, steps: int) -> Took:
    """A loop without any trick: 32 pairs padded to their longest, AdamW as it comes."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    clock = StepClock(steps, job.device)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForSequenceClassification.from_pretrained(job.model, dtype=torch.float32).to(job.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    model.train()
    for examples in job.steps[first : first + WARMUP + steps]:
        queries, documents = map(list, zip(*text_pairs(examples, job.formats), strict=True))
        inputs = tokenizer(
            queries, documents, padding=True, truncation=True, max_length=job.max_len, return_tensors="pt"
        )
        labels = torch.tensor([example.labels for example in examples], device=job.device)
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            scores = model(**inputs.to(job.device)).logits.float().view(labels.shape)
        if job.grouped:
            loss = nn.functional.cross_entropy(scores, labels.argmax(1))
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(scores, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_done()
    return clock.took()
