"""The parts of `gpu.py`: each a function of its options that returns figures, or raises where something is wrong.

Models have random weights and are made on the spot; speed comes from the works of `speed.py`.
"""

import argparse
import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from speed import parse as speed_options
from speed_data import WORDS, made_tokenizer
from speed_embedding_training import (
    make_job,
    our_first_step,
    our_trainer,
    run_train_embedding,
    train_ours,
    train_theirs,
)
from speed_encoding import make_embedder_folder, run_encode
from speed_report import OURS, THEIRS
from speed_training import WARMUP, StepClock, run_ours
from speed_works import run_work

ROOT = Path(__file__).resolve().parents[1]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_SIZES = (32, 64, 128)
TOLERANCE = {"bf16": 0.03, "fp16": 0.01}  # of normalized vectors times the root of their width, against float32
ENGINES = ("ddp", "default_fsdp", *(f"deepspeed/deepspeed_zero{stage}" for stage in (1, 2, 3)))
ENGINE_STEPS = 4
CACHED_TOKENS = {True: 64, False: None}  # of a step that are encoded once: of tiny models; None: as the trainer says
OVERFLOWING = 2.0**28  # a first loss scale that no gradient of fp16 survives
SCALER_STEPS = 32


def prepare(options: argparse.Namespace) -> None:
    """Before the first part of a process."""
    import transformers

    if options.device == "cpu":
        torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("rag_retrieval").setLevel(logging.ERROR)
    os.environ["RAG_RETRIEVAL_CACHE"] = tempfile.mkdtemp()


def in_scratch(part: Callable[..., dict]) -> Callable[..., dict]:
    """part: takes a folder of its own, which is removed after it, beside the options."""

    def run(options: argparse.Namespace, **arguments: str) -> dict:
        with tempfile.TemporaryDirectory() as scratch:
            return part(options, Path(scratch), **arguments)

    return run


# ---- packed attention, beside padded --------------------------------------------------------------------------


@cache
def tokenizer_of(kind: str):
    return made_tokenizer(decoder="causal" in kind)


def config_of(kind: str, size: int):
    """A model of two layers with heads of this size: bidirectional, with a window, causal, or both."""
    from transformers import MistralConfig, ModernBertConfig, Qwen3Config, XLMRobertaConfig

    heads = 4
    shape = dict(
        hidden_size=heads * size, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=4 * size,
        vocab_size=len(tokenizer_of("causal")), pad_token_id=1, initializer_range=0.05,
    )  # fmt: skip
    decoder = dict(num_key_value_heads=2, head_dim=size, bos_token_id=None, eos_token_id=2)
    if kind == "bidirectional":
        return XLMRobertaConfig(**shape, max_position_embeddings=514, type_vocab_size=1)
    if kind == "windowed":
        return ModernBertConfig(**shape, local_attention=64, global_attn_every_n_layers=2)
    if kind == "causal":
        return Qwen3Config(**shape, **decoder)
    return MistralConfig(**shape, **decoder, sliding_window=64)


@in_scratch
def attention(options: argparse.Namespace, scratch: Path, kind: str) -> dict:
    """Vectors and gradients of packed batches in half precision, and of padded ones, against padded float32.

    Raises RuntimeError where packed ones are beyond the limit, or where nothing was packed.
    """
    from transformers import AutoModel

    found, wrong = {}, []
    numbers = random.Random(0)
    texts = [" ".join(numbers.choices(WORDS, k=numbers.randint(1, 300))) for _ in range(6 if options.tiny else 48)]
    for size in HEAD_SIZES[:1] if options.tiny else HEAD_SIZES:
        folder = scratch / f"{kind}-{size}"
        torch.manual_seed(0)
        AutoModel.from_config(config_of(kind, size)).save_pretrained(folder)
        tokenizer_of(kind).save_pretrained(folder)
        expected = vectors_and_gradient(folder, kind, torch.float32, texts, options.device, packed=False)
        for name, dtype in HALF.items():
            own = vectors_and_gradient(folder, kind, dtype, texts, options.device, packed=True)
            padded = vectors_and_gradient(folder, kind, dtype, texts, options.device, packed=False)
            figures = {}
            for layout, (vectors, gradient) in (("packed", own), ("padded", padded)):
                figures[f"{layout}_vectors"] = (vectors - expected[0]).abs().max().item()
                figures[f"{layout}_gradient"] = ((gradient - expected[1]).norm() / expected[1].norm()).item()
            found[f"head {size}, {name}"] = figures
            if not figures["packed_vectors"] <= max(TOLERANCE[name], 2 * figures["padded_vectors"]):
                wrong.append(f"head {size}, {name}: vectors off by {figures['packed_vectors']:.3g}")
            if not figures["packed_gradient"] <= max(0.05, 2 * figures["padded_gradient"]):
                wrong.append(f"head {size}, {name}: gradient off by a share of {figures['packed_gradient']:.3g}")
    if wrong:
        raise RuntimeError(f"packed {kind} attention: {'; '.join(wrong)}; all: {json.dumps(found)}")
    return {"checked": len(found), "largest_difference": max(each["packed_vectors"] for each in found.values())} | found


def vectors_and_gradient(folder: Path, kind: str, dtype: torch.dtype, texts: list[str], device: str, packed: bool):
    """Vectors of order one: [texts, width], and the gradient of their weighted sum at the word embeddings."""
    from rag_retrieval.models.embedder import EmbeddingModel
    from rag_retrieval.models.token_batch import make_batch

    pooling = "last" if "causal" in kind else "mean"
    model = EmbeddingModel.from_pretrained(folder, pooling=pooling, dtype=dtype, max_length=400).to(device).eval()
    if not packed:
        model.packing_problem = "compared with"
    elif not model.packs:
        raise RuntimeError(f"{kind}: not packed in {dtype} on {device}: {model.packing_problem or 'no kernel'}")
    vectors = model(make_batch(model.text_encoder.encode(texts))).dense
    vectors = torch.nn.functional.normalize(vectors) * vectors.shape[1] ** 0.5
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (vectors * weights).sum().backward()
    gradient = model.model.get_input_embeddings().weight.grad
    return vectors.detach().float().cpu(), gradient.float().cpu()


# ---- speed, beside sentence-transformers ----------------------------------------------------------------------


def options_of_speed(options: argparse.Namespace, shape: str, *more: str) -> argparse.Namespace:
    """Of `speed.py`. shape: "encoder" (XLM-RoBERTa-large) or "decoder" (Qwen3-0.6B)."""
    sizes = "--rounds 1 --steps 1 --queries-per-step 4 --texts 24 --pairs 24 --repeats 1 --max-len 32 --threads 1"
    if not options.tiny:
        sizes = "--rounds 2 --steps 8 --queries-per-step 32 --texts 4000 --pairs 4000 --repeats 5 --max-len 256"
    made = speed_options(["--device", options.device, *sizes.split(), "--no-plain", "--out", os.devnull, *more])
    names = {"encoder": "tiny_xlm_roberta", "decoder": "tiny_qwen3"}
    if not options.tiny:
        names = {"encoder": "xlm_roberta_large", "decoder": "qwen3_0.6b"}
    made.encoder = made.decoder = names[shape]  # a work on one shape reads one of the two
    return made


@in_scratch
def training(options: argparse.Namespace, scratch: Path, shape: str) -> dict:
    """Steps of the same records on both sides, theirs with all graphs."""
    return figures_of(run_train_embedding(options_of_speed(options, shape, "--st-batch"), scratch))


@in_scratch
def encoding(options: argparse.Namespace, scratch: Path, shape: str) -> dict:
    """Theirs at its best batch of a trial."""
    return figures_of(run_encode(options_of_speed(options, shape), scratch))


@in_scratch
def scoring(options: argparse.Namespace, scratch: Path, shape: str) -> dict:
    """Many pairs with an encoder; the candidates of one query, after a prompt, with a decoder."""
    work = "score_many" if shape == "encoder" else "score_prompt"
    return figures_of(run_work(work, options_of_speed(options, shape), scratch))


def figures_of(result: dict) -> dict:
    """In flat keys what is told first: times, share of the measured GEMM rate, peak memory. The rest beside it."""
    ours = result["sides"][OURS]
    flat = {
        "our_ms": 1000 * ours["seconds"]["median"],
        "share_of_gemm_rate": ours["share_of_floor"]["median"],
        "gemm_tflops": result["gemm"]["flops_per_second"] / 1e12,
        "our_peak_gib": ours["peak_bytes"] and ours["peak_bytes"] / 2**30,
    }
    for name, side in result["sides"].items():
        if name.startswith(THEIRS):
            flat[f"{name}, times ours"] = side["times_ours"]["median"]
            flat[f"{name}, peak_gib"] = side["peak_bytes"] and side["peak_bytes"] / 2**30
    return flat | {"result": result}


@in_scratch
def caching(options: argparse.Namespace, scratch: Path, side: str) -> dict:
    """A step of 8,192 queries with five texts each, more than its graphs may hold: XLM-RoBERTa-base's shape, at most 48
    tokens. Theirs is the cached loss with mini-batches of 128 texts."""
    made = options_of_speed(options, "encoder")
    made.encoder = "tiny_xlm_roberta" if options.tiny else "xlm_roberta_base"
    made.queries_per_step, made.max_len, made.rounds, made.steps = 16 if options.tiny else 8192, 48, 1, 1
    job, _ = make_job(made, scratch)
    if side == OURS:
        took = train_ours(job, 0, 1, CACHED_TOKENS[options.tiny])
    else:
        took = train_theirs(job, 0, 1, 8 if options.tiny else 128)
    return {"queries": made.queries_per_step, "seconds_of_step": took.seconds, "peak_bytes": took.peak_bytes}


@in_scratch
def cached_gradients(options: argparse.Namespace, scratch: Path) -> dict:
    """Loss and gradient norm of one step, with all graphs kept and with most of them computed again."""
    made = options_of_speed(options, "encoder")
    made.rounds, made.steps = 1, 1
    job, _ = make_job(made, scratch)
    kept, cached = our_first_step(job), our_first_step(job, 64)
    figures = {"loss": kept[0], "norm": kept[1], "cached_loss": cached[0], "cached_norm": cached[1]}
    if not np.allclose(kept, cached, rtol=1e-4 if made.dtype == "float32" else 2e-2):
        raise RuntimeError(f"a step with cached gradients is another step: {figures}")
    return figures


# ---- what happens on a GPU alone ------------------------------------------------------------------------------


@in_scratch
def fp16_scaler(options: argparse.Namespace, scratch: Path) -> dict:
    """Training in fp16 from a loss scale that overflows: steps are skipped, then they are taken. A CPU has no fp16, and
    trains in bf16 here without a scaler."""
    made = options_of_speed(options, "encoder")
    made.rounds, made.steps = 1, 2 if options.tiny else SCALER_STEPS
    made.encoder, made.queries_per_step = "tiny_xlm_roberta", 4
    job, _ = make_job(made, scratch)
    precision = "fp16" if options.device == "cuda" else "bf16"
    (scratch / "fp16").mkdir()
    trainer = our_trainer(job, 0, scratch / "fp16", mixed_precision=precision)
    scaler = trainer.accelerator.scaler
    if scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": OVERFLOWING})
    run_ours(trainer, StepClock(made.steps, options.device))
    lines = [json.loads(line) for line in (scratch / "fp16" / "metrics.jsonl").read_text().splitlines()]
    taken = [line for line in lines if line.get("grad_norm") is not None and math.isfinite(line["grad_norm"])]
    figures = {"precision": precision, "steps": len(lines), "taken": len(taken), "skipped": len(lines) - len(taken)}
    if scaler is not None and not (figures["skipped"] and figures["taken"]):
        raise RuntimeError(f"expected steps that are skipped, and then steps that are taken; found {figures}")
    return figures | {"last_loss": taken[-1]["loss"], "scale": scaler and scaler.get_scale()}


@in_scratch
def out_of_memory(options: argparse.Namespace, scratch: Path) -> dict:
    """A forward that does not fit is made smaller, and its vectors stay. A CPU plays it: every large forward fails."""
    from rag_retrieval import Embedder

    folder = make_embedder_folder(options_of_speed(options, "encoder"), scratch)
    numbers = random.Random(0)
    texts = [" ".join(numbers.choices(WORDS, k=numbers.randint(1, 200))) for _ in range(40 if options.tiny else 2000)]
    embedder = Embedder(folder, device=options.device, dtype="bf16" if options.device == "cuda" else None)
    expected = embedder.encode(texts, batch_size=8)
    if options.device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    else:
        embedder.model.register_forward_pre_hook(fail_beyond(100))
    try:
        found = embedder.encode(texts, batch_size=4096)
    finally:
        if options.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    fitting, difference = embedder.model.fitting_tokens, float(np.abs(found - expected).max())
    if fitting is None or not difference < 0.02:
        raise RuntimeError(f"fitting_tokens {fitting}, vectors differ by {difference:.3g}; expected a smaller forward")
    return {"fitting_tokens": fitting, "largest_difference": difference}


def fail_beyond(tokens: int):
    def fail(module, arguments) -> None:
        if arguments[0].lengths.sum() > tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (played).")

    return fail


def pinned_copies(options: argparse.Namespace) -> dict:
    """Copies that nobody waits for hold what the host's array held, although that is overwritten at once."""
    from rag_retrieval.models.packing import on_device

    device, copies = torch.device(options.device), []
    for number in range(10 if options.tiny else 500):
        values = np.full(100_000, number, np.int32)
        copies.append(on_device(values, device) if device.type == "cuda" else on_device(values.copy(), device))
        values[:] = -1
    wrong = [number for number, copy in enumerate(copies) if not bool((copy == number).all())]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(copies)} copies changed, such as number {wrong[0]}")
    return {"copies": len(copies)}


# ---- engines --------------------------------------------------------------------------------------------------


@in_scratch
def engine(options: argparse.Namespace, scratch: Path, file: str) -> dict:
    """One process of an engine takes steps of a small embedder: their losses."""
    made = options_of_speed(options, "encoder")
    made.rounds, made.steps, made.encoder, made.queries_per_step = 1, ENGINE_STEPS - WARMUP, "tiny_xlm_roberta", 8
    job, _ = make_job(made, scratch)
    values = {
        "task": "embedding",
        "model_name_or_path": str(job.model),
        "train_dataset": str(job.file),
        "query_max_len": 32,
        "passage_max_len": 64,
        "train_group_size": 4,
        "output_dir": str(scratch / "run"),
        "batch_size": 8,
        "lr": 1e-4,
        "log_interval": 1,
        "num_workers": 0,
        "mixed_precision": "bf16" if options.device == "cuda" else "no",
    }
    (scratch / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"config/{file}.yaml")]
    script = str(ROOT / "rag_retrieval/train/embedding/train_embedding.py")
    command = [sys.executable, *launcher, "--num_processes", "1", script, "--config", str(scratch / "run.yaml")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1000:]}")
    lines = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    if not losses or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses {losses}; expected a finite one for each step")
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1], "losses": losses}


def engines(options: argparse.Namespace) -> dict:
    """Every engine, whose losses are those of DDP. Raises RuntimeError where one fails or differs, after all ran."""
    found, wrong = {}, []
    for file in ENGINES[:1] if options.tiny else ENGINES:
        try:
            found[file] = engine(options, file=file)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found[file] = {"losses": None}
            wrong.append(f"{file}: {str(error)[-200:]}")
            continue
        losses, expected = found[file]["losses"], found[ENGINES[0]]["losses"]
        if expected is not None and not np.allclose(losses, expected, rtol=0.05):
            wrong.append(f"{file}: losses {losses}, of {ENGINES[0]} {expected}")
    if wrong:
        raise RuntimeError(f"{'; '.join(wrong)}; all: {json.dumps(found)}")
    return {"engines": len(found)} | found


PARTS: dict[str, dict[str, Callable[[argparse.Namespace], dict]]] = {
    "attention": {
        kind: partial(attention, kind=kind) for kind in ("bidirectional", "windowed", "causal", "windowed causal")
    },
    **{
        shape: {
            "training": partial(training, shape=shape),
            "encoding": partial(encoding, shape=shape),
            "scoring": partial(scoring, shape=shape),
        }
        for shape in ("encoder", "decoder")
    },
    "caching": {
        "ours": partial(caching, side=OURS),
        THEIRS: partial(caching, side=THEIRS),
        "the same step": cached_gradients,
    },
    "checks": {"pinned copies": pinned_copies, "out of memory": out_of_memory, "fp16 scaler": fp16_scaler},
    "engines": {"one process": engines},
}
