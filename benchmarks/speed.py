"""How fast we train and score, beside sentence-transformers and a plain loop in the same process.

    python benchmarks/speed.py --out speed.jsonl
    python benchmarks/speed.py --device cuda --out speed.jsonl
    git worktree add ../old fad153e && python benchmarks/speed.py --old ../old --out speed.jsonl

Sides take turns, in reversed order every other round, on the same model folder, pairs, precision and threads.
Compare the sides of one work alone: figures of two works, or of two runs of this script, are of different moments of a
machine that others may be using.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from speed_data import DECODERS, ENCODERS
from speed_report import describe, machine, versions

TRAINING_WORKS = ("train_lognormal", "train_bf16", "train_decoder", "train_medquad")
SCORING_WORKS = ("score_many", "score_query", "score_prompt")
WORKS = TRAINING_WORKS + SCORING_WORKS + ("train_embedding", "encode", "onnx")
NOT_ON_CUDA = ("train_bf16", "train_medquad", "onnx")  # unless named: all runs in bf16 there, and these need --data
MODELS = {"cpu": ("minilm", "small_qwen2"), "cuda": ("xlm_roberta_large", "qwen2.5_1.5b")}
BATCHES = (1, 2, 4, 8, 16, 32)  # pairs

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    prepare_environment(options)
    import torch
    import transformers
    from speed_embedding_training import run_train_embedding
    from speed_encoding import run_encode
    from speed_onnx import describe_onnx, run_onnx
    from speed_works import run_work

    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("rag_retrieval").setLevel(logging.ERROR)  # no advice on a model that learns from noise
    written = " ".join(["python benchmarks/speed.py", *(sys.argv[1:] if arguments is None else arguments)])
    for work in options.work:
        if work == "train_medquad" and options.data is None:
            print(f"{work}: skipped, it needs --data, a folder in BEIR layout", flush=True)
            continue
        if work == "onnx" and None in (options.data, options.model):
            print("onnx: skipped, it needs --model, a trained one, and --data, a folder in BEIR layout", flush=True)
            continue
        with tempfile.TemporaryDirectory() as scratch:  # of each work: large models are 6 GB
            os.environ["RAG_RETRIEVAL_CACHE"] = str(Path(scratch) / "cache")
            runs = {"onnx": run_onnx, "encode": run_encode, "train_embedding": run_train_embedding}
            run = runs.get(work, partial(run_work, work))
            result = run(options, Path(scratch))
        print((describe_onnx if work == "onnx" else describe)(result) + "\n", flush=True)
        row = result | {"machine": machine(options.device), "versions": versions(), "command": written}
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", choices=WORKS, help="default all; on cuda all but bf16 and medquad")
    parser.add_argument("--device", choices=MODELS, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bf16"), help="default float32; cuda is always bf16")
    parser.add_argument("--encoder", choices=ENCODERS, help="default minilm; on cuda xlm_roberta_large")
    parser.add_argument("--decoder", choices=DECODERS, help="default small_qwen2; on cuda qwen2.5_1.5b")
    parser.add_argument("--threads", type=int, default=2, help="of torch and the tokenizers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps of a round, 32 pairs each")
    parser.add_argument("--queries-per-step", type=int, default=32, help="of train_embedding, with 4 documents each")
    parser.add_argument("--pairs", type=int, default=10_000, help="of score_many")
    parser.add_argument("--texts", type=int, default=10_000, help="of encode")
    parser.add_argument("--max-len", type=int, default=256, help="tokens of a text of encode and train_embedding")
    parser.add_argument("--repeats", type=int, default=10, help="calls of a round with one query's candidates")
    sizes = "pairs that sentence-transformers trains on at once, accumulated to 32; each is a side of its own (of "
    sizes += "train_embedding, texts of a mini-batch of its cached loss)"
    parser.add_argument("--st-batch", type=int, nargs="*", default=[1, 8, 32], choices=BATCHES, help=sizes)
    parser.add_argument("--workers", type=int, default=0, help="loading processes of each trainer")
    parser.add_argument("--old", type=Path, help="checkout of an older commit as one more side (a git worktree)")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain loop out")
    parser.add_argument("--data", type=Path, help="folder in BEIR layout for train_medquad, embedders and onnx")
    parser.add_argument("--model", type=Path, help="folder of a trained model, for onnx")
    parser.add_argument("--queries", type=int, default=100, help="judged queries of onnx, at most")
    parser.add_argument("--depth", type=int, default=30, help="candidates of each query of onnx")
    parser.add_argument("--out", type=Path, required=True, help="file to append a line of JSON per work to")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and options.dtype == "float32":
        parser.error("--dtype float32: on cuda our scoring runs in half precision; take bf16")
    encoder, decoder = MODELS[options.device]
    options.encoder, options.decoder = options.encoder or encoder, options.decoder or decoder
    options.dtype = options.dtype or ("bf16" if on_gpu else "float32")
    options.work = options.work or [work for work in WORKS if not (on_gpu and work in NOT_ON_CUDA)]
    return options


def prepare_environment(options: argparse.Namespace) -> None:
    """Before torch and the tokenizers are loaded: they read these once."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.threads > 1 else "false"
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both trainers take a GPU where they see one
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the other trainer would take all of several


if __name__ == "__main__":
    main()
