"""The work `encode` of `speed.py`: vectors of many single texts, beside `encode` of sentence-transformers.

    python benchmarks/speed.py --work encode --data ../shared/data/medquad --texts 400 --max-len 256 --out speed.jsonl

Both sides open the same folder and encode the same texts in one call, tokenization included. The texts are documents
of `--data` that a seed draws, or of log-normal length without it.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from speed_data import DECODERS, draw_examples, make_model_folder, single_token_words
from speed_floor import cpu_now, gemm_rate, gemm_shapes, model_cost
from speed_report import OURS, THEIRS, spread, summary_of_side
from speed_training import DTYPES, SEED, Took
from speed_works import TRIAL_PAIRS, check_agreement, say, take_turns, time_calls

BATCHES = (4, 8, 16, 32, 64, 128)  # texts, tried for the other side


@dataclass
class EncodingJob:
    """What `take_turns` and `time_calls` need of a job."""

    model: Path
    dtype: str
    device: str


def run_encode(options: argparse.Namespace, scratch: Path) -> dict:
    """Everything that goes into the line of JSON. Raises Disagreement where the two sides' vectors differ."""
    from transformers import AutoTokenizer

    say("encode ...")
    job = EncodingJob(make_embedder_folder(options, scratch), options.dtype, options.device)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    texts = draw_texts(options, tokenizer)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=options.max_len)["input_ids"]]
    sample = texts[: min(TRIAL_PAIRS, len(texts) // 2)]
    on_cpu = job.device == "cpu"
    tried = {size: time_calls(job, their_encode(job, size), sample, 1)[0] for size in BATCHES}
    trials = {size: each.cpu_seconds if on_cpu else each.seconds for size, each in tried.items()}
    batch = min(trials, key=trials.get)
    vectors: dict[str, torch.Tensor] = {}

    def turn_of(name: str, load):
        def turn(number: int):
            took, vectors[name] = time_calls(job, load(), texts, 1)
            return took

        return turn

    turns = {OURS: turn_of(OURS, lambda: our_encode(job)), THEIRS: turn_of(THEIRS, lambda: their_encode(job, batch))}
    took, gemm = take_turns(job, turns, options.rounds)
    numbers = (vectors[name].flatten().tolist() for name in (OURS, THEIRS))
    agreement = {"of": "numbers of vectors", "largest_difference": check_agreement("vectors", *numbers, job.dtype)}
    flops = model_cost(job.model).forward_flops(lengths)
    floors = [flops / gemm["flops_per_second"]] * options.rounds
    return {
        "work": "encode",
        "model": options.encoder,
        "dtype": job.dtype,
        "device": job.device,
        "threads": options.threads,
        "unit": "call",
        "of": "texts",
        "rounds": options.rounds,
        "units": 1,
        "pairs": len(texts),
        "tokens_of_a_pair": sum(lengths) / len(lengths),
        "max_len": options.max_len,
        "data": options.data and options.data.name,
        "gemm": gemm,
        "floor_seconds": floors[0],
        "sides": {name: summary_of_side(rounds, took[OURS], floors, 1) for name, rounds in took.items()},
        **(cpu_floor(job, took, [flops] * options.rounds) if on_cpu else {}),
        "agreement": agreement,
        "their_batch": batch,
        "their_trials": trials,
    }


def cpu_floor(job, took: dict[str, list[Took]], flops: list[float]) -> dict:
    """The machine's best product and the share of it that each side reaches, both in CPU seconds. flops: of what each
    round computes."""
    rate, _ = gemm_rate(gemm_shapes(job.model, "cpu"), DTYPES[job.dtype], "cpu", clock=cpu_now)
    shares = {
        name: spread([each / rate / own.cpu_seconds for each, own in zip(flops, rounds, strict=True)])
        for name, rounds in took.items()
    }
    return {"cpu_gemm_flops_per_second": rate, "cpu_share_of_floor": shares}


def make_embedder_folder(options: argparse.Namespace, scratch: Path) -> Path:
    """A sentence-transformers folder: mean of the token states (of a decoder the last one), of length 1, at most
    `--max-len` tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    classifier = make_model_folder(options.encoder, scratch / "classifier", options.device)
    body = Transformer(str(classifier), max_seq_length=options.max_len)
    pooling = "lasttoken" if options.encoder in DECODERS else "mean"
    modules = [body, Pooling(body.get_embedding_dimension(), pooling_mode=pooling), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(scratch / "embedder"))
    return scratch / "embedder"


def draw_texts(options: argparse.Namespace, tokenizer) -> list[str]:
    if options.data is None:
        numbers, fixed = random.Random(SEED), tokenizer.num_special_tokens_to_add()
        examples = draw_examples(options.texts, 1, single_token_words(tokenizer), fixed, numbers)
        return [f"{example.query} {example.documents[0]}" for example in examples]
    from rag_retrieval.data.beir import read_folder

    documents = list(read_folder(options.data).documents.values())
    return random.Random(SEED).sample(documents, min(options.texts, len(documents)))


def our_encode(job: EncodingJob):
    from rag_retrieval import Embedder

    embedder = Embedder(job.model, device=job.device, dtype="bf16" if job.dtype == "bf16" else None)
    return lambda texts: torch.from_numpy(embedder.encode(texts, show_progress_bar=False))


def their_encode(job: EncodingJob, batch: int):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(job.model), device=job.device, model_kwargs={"dtype": DTYPES[job.dtype]})
    options = {"batch_size": batch, "show_progress_bar": False, "convert_to_tensor": True}
    return lambda texts: model.encode(texts, **options).cpu()
