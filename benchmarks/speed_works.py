"""The works that `speed.py` measures: training on steps of pairs or groups, and scoring calls.

Each checks first that the sides compute the same: a side that skips work would win. A decoder's formats
are put around a pair by our model itself; for the others `text_pairs` does it.
"""

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from speed_checkouts import score_checkout, train_checkout
from speed_data import (
    LONGEST,
    Example,
    draw_examples,
    make_model_folder,
    medquad_examples,
    prompt_formats,
    single_token_words,
    text_pairs,
    without_dropout,
    write_examples,
)
from speed_floor import gemm_rate, gemm_shapes, now
from speed_report import FLAG, OLD, OURS, PLAIN, THEIRS, summarise
from speed_training import (
    DTYPES,
    PAIRS_PER_STEP,
    SEED,
    WARMUP,
    Job,
    Took,
    empty_memory,
    our_losses,
    peak_bytes,
    plan_steps,
    their_losses,
    their_model,
    train_ours,
    train_plain,
    train_sentence_transformers,
)
from transformers import AutoTokenizer

DECODER_WORKS = ("train_decoder", "score_prompt")
GROUP = 8  # documents of a decoder's group
CANDIDATES = 100  # of one query
SCORING_BATCHES = (16, 32, 64, 128)  # pairs, tried for the other side
TRIAL_PAIRS = 512
AGREEING_STEPS = 10
LIMITS = {"float32": 1e-3, "bf16": 2e-2}  # largest difference of a loss or a score between two sides

Pairs = list[tuple[str, str]]
Scorer = Callable[[Pairs], torch.Tensor]
Turn = Callable[[int], Took]  # from the number of the round


class Disagreement(RuntimeError):
    """Two sides do not compute the same, so their times say nothing."""


def run_work(work: str, options: argparse.Namespace, scratch: Path) -> dict:
    """Everything about one work that goes into its line of JSON."""
    say(f"{work} ...")
    decoder = work in DECODER_WORKS
    model = options.decoder if decoder else options.encoder
    folder = make_model_folder(model, scratch / "model", options.device)
    job = Job(
        model=folder,
        file=scratch / "examples.jsonl",
        examples=make_examples(work, options, AutoTokenizer.from_pretrained(folder)),
        formats=prompt_formats() if decoder else None,
        max_len=2 * LONGEST if decoder else LONGEST,  # a decoder's formats come on top of what was drawn
        dtype="bf16" if work == "train_bf16" else options.dtype,
        device=options.device,
        workers=options.workers,
        scratch=scratch,
    )
    write_examples(job.examples, job.file)
    measured = train(job, options) if work.startswith("train") else score(work, job, options)
    setting = {"dtype": job.dtype, "device": job.device, "threads": options.threads, "workers": job.workers}
    return {"work": work, "model": model, **setting, **measured}


def make_examples(work: str, options: argparse.Namespace, tokenizer) -> list[Example]:
    """As many as all rounds of the work take."""
    pairs = PAIRS_PER_STEP * max(options.rounds * (WARMUP + options.steps), AGREEING_STEPS + 1)
    if work == "train_medquad":
        return medquad_examples(options.data, pairs)
    documents = {"train_decoder": GROUP, "score_query": CANDIDATES, "score_prompt": CANDIDATES}.get(work, 1)
    count = {"score_many": options.pairs, "score_query": 1, "score_prompt": 1}.get(work, pairs // documents)
    fixed = 0 if work in DECODER_WORKS else tokenizer.num_special_tokens_to_add(pair=True)
    return draw_examples(count, documents, single_token_words(tokenizer), fixed, random.Random(SEED))


# --- training ---


def train(job: Job, options: argparse.Namespace) -> dict:
    """Losses compared, then the rounds, each on steps of its own; sentence-transformers at each of its batches."""
    planning = plan_steps(job)
    agreement = compare_losses(job)
    steps, stride = options.steps, WARMUP + options.steps
    turns: dict[str, Turn] = {OURS: lambda turn: train_ours(job, turn * stride, steps)}
    for name, checkout in checkouts(options).items():
        turns[name] = lambda turn, checkout=checkout: train_checkout(checkout, job, turn * stride, steps)
    for size in sorted({max(size, job.documents) for size in options.st_batch}):
        turns[f"{THEIRS} {size} x {PAIRS_PER_STEP // size}"] = lambda turn, size=size: train_sentence_transformers(
            job, turn * stride, steps, size
        )
    if not options.no_plain:
        turns[PLAIN] = lambda turn: train_plain(job, turn * stride, steps)
    took, gemm = take_turns(job, turns, options.rounds)
    starts = [turn * stride + WARMUP for turn in range(options.rounds)]
    timed = [[example for step in job.steps[start : start + steps] for example in step] for start in starts]
    result = summarise(job, took, gemm, timed, units=steps, training=True)
    share = planning / result["sides"][OURS]["seconds"]["median"]
    return result | {"agreement": agreement, "planning_share": share}


def compare_losses(job: Job) -> dict:
    """Step by step without any dropout. Raises Disagreement beyond the precision's limit."""
    job = replace(job, model=without_dropout(job.model, job.scratch / "without_dropout"))
    ours, theirs = our_losses(job, AGREEING_STEPS), their_losses(job, AGREEING_STEPS)
    largest = check_agreement("losses of a step", ours, theirs, job.dtype)
    return {"of": f"losses of {AGREEING_STEPS} steps", "largest_difference": largest, "ours": ours, "theirs": theirs}


def check_agreement(what: str, ours: list[float], theirs: list[float], dtype: str) -> float:
    """The largest difference. Raises Disagreement beyond the limit, or where a value is not finite."""
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    for place, difference in enumerate(differences):
        if not difference <= LIMITS[dtype]:
            raise Disagreement(
                f"{what}: ours {ours[place]:.6f}, theirs {theirs[place]:.6f} at place {place}; expected to agree "
                f"within {LIMITS[dtype]} in {dtype}. Times of sides that compute different things are not compared"
            )
    return max(differences)


# --- scoring ---


def score(work: str, job: Job, options: argparse.Namespace) -> dict:
    """The other side's best batch found on a sample, then the rounds; the last scores of both are compared."""
    plain, formatted = text_pairs(job.examples, None), text_pairs(job.examples, job.formats)
    repeats = 1 if work == "score_many" else options.repeats
    sample = formatted[:TRIAL_PAIRS]
    trials = {size: time_calls(job, their_scorer(job, size), sample, 2)[0].seconds for size in SCORING_BATCHES}
    batch = min(trials, key=trials.get)
    scores: dict[str, torch.Tensor] = {}

    def turn_of(name: str, load: Callable[[], Scorer], pairs: Pairs) -> Turn:
        def turn(number: int) -> Took:
            took, scores[name] = time_calls(job, load(), pairs, repeats)
            return took

        return turn

    turns = {
        OURS: turn_of(OURS, lambda: our_scorer(job), plain),
        THEIRS: turn_of(THEIRS, lambda: their_scorer(job, batch), formatted),
    }

    def turn_of_checkout(name: str, checkout: Path) -> Turn:
        def turn(number: int) -> Took:
            took, scores[name] = score_checkout(checkout, job, plain, repeats)
            return took

        return turn

    turns |= {name: turn_of_checkout(name, checkout) for name, checkout in checkouts(options).items()}
    if flag_embedding_can(job):
        turns[FLAG] = turn_of(FLAG, lambda: flag_embedding_scorer(job, batch), formatted)
    took, gemm = take_turns(job, turns, options.rounds)
    largest = check_agreement("scores", scores[OURS].tolist(), scores[THEIRS].tolist(), job.dtype)
    if OLD in scores:
        say(f"  {OLD}: scores differ by at most {(scores[OURS] - scores[OLD]).abs().max():.2g}")
    result = summarise(job, took, gemm, [job.examples] * options.rounds, units=1, training=False)
    agreement = {"of": f"{len(plain):,} scores", "largest_difference": largest}
    return result | {"units": repeats, "agreement": agreement, "their_batch": batch, "their_trials": trials}


def checkouts(options: argparse.Namespace) -> dict[str, Path]:
    """Sides in processes of their own: where an older commit takes part, ours too."""
    return {OURS: Path(__file__).resolve().parents[1], OLD: options.old} if options.old else {}


def our_scorer(job: Job) -> Scorer:
    from rag_retrieval import CrossEncoder, LLMDecoder

    formats = job.formats._asdict() if job.formats else {}
    family = LLMDecoder if job.formats else CrossEncoder
    model = family.from_pretrained(job.model, max_length=job.max_len, dtype=DTYPES[job.dtype], **formats)
    model.to(job.device)
    return lambda pairs: model.compute_score(pairs, show_progress_bar=False)


def their_scorer(job: Job, batch: int) -> Scorer:
    model = their_model(job, DTYPES[job.dtype])
    return lambda pairs: model.predict(pairs, batch_size=batch, show_progress_bar=False, convert_to_tensor=True).cpu()


def flag_embedding_can(job: Job) -> bool:
    """Whether FlagEmbedding's reranker takes part; says why it does not."""
    installed = importlib.util.find_spec("FlagEmbedding") is not None
    suits = job.formats is None and job.dtype == "float32"
    if not installed or not suits:
        say(f"  {FLAG} takes no part: " + ("only encoders in float32 are alike" if installed else "not installed"))
    return installed and suits


def flag_embedding_scorer(job: Job, batch: int) -> Scorer:
    from FlagEmbedding import FlagReranker

    settings = {"use_fp16": False, "batch_size": batch, "max_length": job.max_len}
    model = FlagReranker(str(job.model), devices=[job.device], **settings)
    return lambda pairs: torch.tensor(model.compute_score(pairs))


def time_calls(job: Job, scorer: Scorer, pairs: Pairs, repeats: int) -> tuple[Took, torch.Tensor]:
    """The median of calls, tokenization included, after one on a few pairs; and the scores."""
    scorer(pairs[:8])
    empty_memory(job.device)
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = now(job.device), time.process_time()
        scores = scorer(pairs)
        walls.append(now(job.device) - wall)
        cpus.append(time.process_time() - cpu)
    return Took(median(walls), median(cpus), peak_bytes(job.device)), scores.float()


# --- rounds ---


def take_turns(job: Job, turns: dict[str, Turn], rounds: int) -> tuple[dict[str, list[Took]], dict]:
    """What each side took in each round, and the machine's best product, measured before every round.

    A side that does not fit into memory is left out, unless it is ours.
    """
    took: dict[str, list[Took]] = {name: [] for name in turns}
    rates = []
    for number in range(rounds):
        rates.append(gemm_rate(gemm_shapes(job.model, job.device), DTYPES[job.dtype], job.device))
        for name in list(took) if number % 2 == 0 else list(reversed(took)):
            try:
                took[name].append(turns[name](number))
            except torch.OutOfMemoryError:
                if name == OURS:
                    raise
                say(f"  {name} has not enough memory and is left out")
                del took[name]
                continue
            say(f"  round {number + 1}, {name}: {took[name][-1].seconds:.3f} s")
    rate, shape = max(rates)
    return took, {"flops_per_second": rate, "shape": shape}


def say(text: str) -> None:
    """Progress, beside the results on standard output."""
    print(text, file=sys.stderr, flush=True)
