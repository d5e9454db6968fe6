"""Memory and time of mining in 100,000 and 1,000,000 documents, by words and by vectors.

Makes documents of words drawn by Zipf's law, queries that are some words of a document each, and a tiny encoder
with random weights. Each row is a process of its own. Run: `python benchmarks/mine_memory.py --work FOLDER`.

RSS counts mapped pages of index, vectors and corpus too, which the system drops when memory is short.
What the process has for itself is "private": RSS less file-backed pages.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import bm25s
import numpy as np
import torch
from data_memory import MIB, highest_memory
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rag_retrieval.data.corpus import build_corpus
from rag_retrieval.data.documents import read_documents
from rag_retrieval.data.words import tokenize
from rag_retrieval.mining.config import MiningConfig
from rag_retrieval.mining.run import mine

WORDS = 200_000  # in the vocabulary
DENSE_WORDS = 8000  # of them known to the encoder
WIDTH = 128
WAYS = ("bm25", "dense", "fused", "bm25s.index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the data; 5 GB for 1,000,000 documents")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="documents")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--words", type=int, default=100, help="of a document, on average")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["bm25", "dense"])
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, ", end="")
    print(f"bm25s {bm25s.__version__}, {torch.get_num_threads()} thread(s); memory in MiB, highest")
    print(f"{'documents':>10} {'way':>12} {'seconds':>8} {'CPU':>7} {'RSS':>7} {'private':>8}")
    encoder = options.work / "encoder"
    write_encoder(encoder)
    for size in options.sizes:
        data = options.work / f"data-{size}"
        write_data(data, size, options.queries, options.words)
        for way in options.ways:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, cpu, rss, private = pool.apply(measure, (way, data, encoder))
            print(f"{size:>10,} {way:>12} {seconds:>8.1f} {cpu:>7.1f} {rss:>7.0f} {private:>8.0f}", flush=True)


def write_data(folder: Path, size: int, num_queries: int, words: int) -> None:
    """A folder in BEIR layout; a query is the first four words of a document, its one positive, and a number."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    stride = size // num_queries
    files = [(folder / name).open("w") for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv")]
    for row, text in enumerate(random_texts(size, words)):
        files[0].write(json.dumps({"_id": f"d{row}", "text": " ".join(text)}) + "\n")
        if row % stride == 0 and row // stride < num_queries:
            files[1].write(json.dumps({"_id": f"q{row}", "text": f"{' '.join(text[:4])} {row}"}) + "\n")
            files[2].write(f"q{row}\td{row}\t1\n")
    for file in files:
        file.close()


def random_texts(size: int, words: int) -> Iterator[list[str]]:
    """From half to one and a half times `words` words each, a word with a frequency like 1 / rank ** 1.2."""
    generator, names = np.random.default_rng(0), word_names(WORDS)
    for start in range(0, size, 1000):
        ends = np.cumsum(generator.integers(words // 2, words + words // 2, min(1000, size - start))).tolist()
        drawn = (np.minimum(generator.zipf(1.2, ends[-1]), WORDS) - 1).tolist()
        for begin, end in zip([0, *ends], ends, strict=False):
            yield [names[word] for word in drawn[begin:end]]


def word_names(count: int) -> list[str]:
    return [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{i}" for i in range(count)]


def write_encoder(folder: Path) -> None:
    """A plain folder: BERT of one layer and width 128, a vocabulary of the most frequent words."""
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *word_names(DENSE_WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape), add_pooling_layer=False).save_pretrained(folder)


def measure(way: str, data: Path, encoder: Path) -> tuple[float, float, float, float]:
    """(seconds, CPU seconds, highest RSS and private memory in MiB) of everything that the way does."""
    transformers_logging.set_verbosity_error()
    start, cpu = time.perf_counter(), time.process_time()
    with highest_memory(0.05) as highest:
        if way == "bm25s.index":
            index_with_bm25s(data)
        else:
            dense = {"dense_model": str(encoder), "dense_max_len": 16, "dense_batch_size": 256} if way != "bm25" else {}
            output = data / f"{way}-{os.getpid()}.jsonl"
            mine(MiningConfig(data=str(data), output=str(output), candidates=way, **dense))
            output.unlink()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return time.perf_counter() - start, time.process_time() - cpu, rss / MIB, highest[0] / MIB


def index_with_bm25s(data: Path) -> None:
    """What bm25s needs by itself for the same index: all words in memory, sorted at once."""
    folder = data / "bm25s-corpus"
    folder.mkdir(exist_ok=True)
    corpus = build_corpus(read_documents(data / "corpus.jsonl"), folder)
    words = [cut for texts in corpus.blocks(2000) for cut in tokenize(texts)]
    bm25s.BM25(k1=1.2, b=0.75).index(words, show_progress=False)


if __name__ == "__main__":
    main()
