"""Tiny real Hugging Face folders for tests: config, random weights from a seed, and a trained tokenizer.

Every tokenizer is the family's own class, trained here on a few English and Chinese sentences, so that its
special tokens, byte fallback and word boundaries behave as in the real model. Weights are drawn wide
(`initializer_range` 0.2), else all scores of a random model would be nearly equal and no test would notice.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

ENGLISH = (
    "A reranker reads a query and a document together and gives the pair a score.",
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "How do I open a file in Python and read it line by line?",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Fever, cough and tiredness are common symptoms of influenza in adults and children.",
    "The function returns a list of tuples; each tuple holds a name and a number.",
    "Water boils at 100 degrees Celsius at sea level, and at lower temperatures on high mountains.",
    "Sort the words by length, then by alphabet, and print the first 25 of them.",
    "query: what is the best medicine for a headache? document: rest, water and aspirin may help. relevance",
    "Trains leave the station every 15 minutes from 6:30 in the morning until midnight.",
)
CHINESE = (
    "北京是中国的首都，也是全国的政治和文化中心。",
    "今天天气怎么样？明天会下雨吗？",
    "如何用一种程序语言打开文件并逐行读取内容？",
    "感冒的常见症状包括发烧、咳嗽和疲倦。",
    "模型读取问题和文档，然后给出一个相关性分数。",
    "水在一百度时沸腾，在高山上沸点会降低。",
)
TEXTS = ENGLISH + CHINESE
VOCABULARY = 600
HIDDEN = 32


def tiny_bert(folder: Path | str, **options) -> str:
    """`[CLS] a [SEP] b [SEP]`, token types, 512 positions."""
    tokenizer = bert_tokenizer()
    config = BertConfig(**_shape(tokenizer, "intermediate_size"), pad_token_id=tokenizer.pad_token_id)
    return save_tiny(folder, config, tokenizer, **options)


def tiny_xlm_roberta(folder: Path | str, **options) -> str:
    """`<s> a </s></s> b </s>`, pad id 1, positions numbered from 2: 514 of them hold 512 tokens."""
    tokenizer = xlm_roberta_tokenizer()
    shape = _shape(tokenizer, "intermediate_size") | {"max_position_embeddings": 514, "type_vocab_size": 1}
    return save_tiny(
        folder, XLMRobertaConfig(**shape, pad_token_id=tokenizer.pad_token_id), tokenizer, **options
    )


def tiny_qwen2(
    folder: Path | str, *, eos_token: str = "<|im_end|>", pad_token: str | None = "<|endoftext|>", **options
) -> str:
    """Byte-level BPE without bos. pad_token equal to eos_token, or None for a tokenizer that has none."""
    tokenizer = qwen2_tokenizer(eos_token, pad_token)
    config = Qwen2Config(**_decoder_shape(tokenizer), num_key_value_heads=1, bos_token_id=None)
    return save_tiny(folder, config, tokenizer, **options)


def tiny_joining_qwen2(folder: Path | str, **options) -> str:
    """Qwen2 whose tokens of a sign and a line break are one, as the real one's are."""
    tokenizer = joining_tokenizer()
    config = Qwen2Config(**_decoder_shape(tokenizer), num_key_value_heads=1, bos_token_id=None)
    return save_tiny(folder, config, tokenizer, **options)


def tiny_llama(folder: Path | str, *, pad_token: str | None = None, **options) -> str:
    """bos `<s>`, eos `</s>`, byte fallback, no pad token unless one is named (`"</s>"`: pad equals eos)."""
    tokenizer = llama_tokenizer(pad_token)
    config = LlamaConfig(
        **_decoder_shape(tokenizer), num_key_value_heads=1, bos_token_id=tokenizer.bos_token_id
    )
    return save_tiny(folder, config, tokenizer, **options)


def save_tiny(
    folder: Path | str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head_labels: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
) -> str:
    """Write the folder and return its path.

    layers: in place of the configuration's. head_labels: labels of a sequence-classification head; 0 writes the base (a
    causal model for decoders).
    dtype: of the checkpoint.
    """
    if layers is not None:
        config = type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    decoder = hasattr(config, "num_key_value_heads")
    auto = AutoModelForCausalLM if decoder else AutoModel
    if head_labels:
        auto, config.num_labels = AutoModelForSequenceClassification, head_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def bring_code(bert: Path | str, folder: Path) -> str:
    """A copy of a BERT folder whose classes are Python code beside its weights, as of models that are not in
    transformers."""
    shutil.copytree(bert, folder)
    (folder / "own_bert.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own_bert'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
        "class OwnForSequenceClassification(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "OwnConfig", "AutoModel": "OwnModel"}
    classes["AutoModelForSequenceClassification"] = "OwnForSequenceClassification"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_bert", "auto_map": {name: f"own_bert.{own}" for name, own in classes.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _shape(tokenizer: PreTrainedTokenizerBase, *inner: str) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    } | dict.fromkeys(inner, 2 * HIDDEN)


def _decoder_shape(tokenizer: PreTrainedTokenizerBase) -> dict:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return _shape(tokenizer, "intermediate_size") | {"max_position_embeddings": 1024} | ids


def bert_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab=dict(_wordpiece_vocabulary()))


def xlm_roberta_tokenizer() -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(vocab=list(_unigram_vocabulary()))


def qwen2_tokenizer(eos_token: str = "<|im_end|>", pad_token: str | None = "<|endoftext|>") -> Qwen2Tokenizer:
    vocabulary, merges = _byte_level_bpe()
    tokens = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    return Qwen2Tokenizer(
        vocab=dict(vocabulary),
        merges=list(merges),
        eos_token=eos_token,
        pad_token=pad_token,
        unk_token=None,
        added_tokens_decoder={len(vocabulary) + place: token for place, token in enumerate(tokens)},
        model_max_length=32768,
    )


def joining_tokenizer() -> Qwen2Tokenizer:
    """With Qwen's tokens for "?" or "." and a line break, and for two line breaks."""
    vocabulary, merges = _byte_level_bpe()
    joined = [("?", "Ċ"), (".", "Ċ"), ("Ċ", "Ċ")]
    first = len(vocabulary)
    special = qwen2_tokenizer().added_tokens_decoder.values()
    return Qwen2Tokenizer(
        vocab=dict(vocabulary) | {"".join(pair): first + place for place, pair in enumerate(joined)},
        merges=[*merges, *joined],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        added_tokens_decoder={first + len(joined) + place: token for place, token in enumerate(special)},
    )


def llama_tokenizer(pad_token: str | None = None) -> LlamaTokenizer:
    vocabulary, merges = _byte_fallback_bpe()
    return LlamaTokenizer(
        vocab=dict(vocabulary), merges=list(merges), pad_token=pad_token, add_bos_token=True
    )


@cache
def _wordpiece_vocabulary() -> tuple[tuple[str, int], ...]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces = [token for token, _ in _trained_bpe(tokenizer, _trainer(VOCABULARY // 2))[0]]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return tuple(
        (token, place) for place, token in enumerate(special + pieces + [f"##{piece}" for piece in pieces])
    )


@cache
def _unigram_vocabulary() -> tuple[tuple[str, float], ...]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [token for token, _ in _trained_bpe(tokenizer, _trainer(VOCABULARY))[0]]
    # one long piece must cost less than two short ones, and an early merge less than a late one
    scored = [(piece, -1.0 - rank / (2 * VOCABULARY)) for rank, piece in enumerate(pieces)]
    return tuple((token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")) + (*scored, ("<mask>", 0.0))


@cache
def _byte_level_bpe() -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained_bpe(tokenizer, _trainer(VOCABULARY, initial_alphabet=sorted(alphabet)))


@cache
def _byte_fallback_bpe() -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    return _trained_bpe(tokenizer, _trainer(256 + VOCABULARY, special_tokens=special))


def _trainer(vocabulary: int, **options) -> trainers.BpeTrainer:
    """Byte pairs for every family: the WordPiece and Unigram trainers give other pieces in each process."""
    return trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **options)


def _trained_bpe(tokenizer: Tokenizer, trainer: trainers.BpeTrainer):
    tokenizer.train_from_iterator(TEXTS, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tuple(vocabulary), tuple(tuple(merge) for merge in merges)
