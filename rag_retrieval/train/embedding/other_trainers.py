"""The keys of other embedding trainers, so that their files and commands run here: RAG-Retrieval's, FlagEmbedding's,
PaddleNLP's.

`docs/embedding.md` has all of them in one table.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rag_retrieval.core.config import ABSENT, shown_value
from rag_retrieval.models.representations import REPRESENTATIONS
from rag_retrieval.train.config import TrainingConfig

ALIASES = TrainingConfig.aliases | {  # another name of a key of ours, with the same values
    # RAG-Retrieval
    "dataset": "train_dataset",
    "all_gather": "negatives_cross_device",
    "teacher_emebedding_dim": "teacher_embedding_dim",
    "teatch_emebedding_dim": "teacher_embedding_dim",
    # FlagEmbedding
    "train_data": "train_dataset",
    "query_instruction_for_retrieval": "query_instruction",
    "passage_instruction_for_retrieval": "document_instruction",
    "sentence_pooling_method": "pooling",
    "normalize_embeddings": "normalize",
    "normlized": "normalize",
    # PaddleNLP
    "use_matryoshka": "use_mrl",
    "matryoshka_dims": "mrl_dims",
    "matryoshka_loss_weights": "mrl_weights",
    "recompute": "gradient_checkpointing",
}
POOLING_NAMES = {"last_token": "last"}
WITHOUT_EFFECT = {  # and why
    "do_train": "this program does nothing else",
    "use_parallel": "the launcher says it",
    "pad_to_multiple_of": "batches have no padding",
    "dataloader_drop_last": "steps are full and no record is dropped",
    "use_flash_attention": "attention follows the model and the device",
    "same_dataset_within_batch": "each step is of one file",
    "sub_batch_size": "max_tokens_per_batch does it",
    "safe_serialization": "models are always written as safetensors",
    "cache_dir": "HF_HOME names the hub's cache",
    "cache_path": "RAG_RETRIEVAL_CACHE names the cache of data",
    "small_threshold": "every file is used",
    "drop_threshold": "every file is used",
    "deepspeed": "the file of accelerate launch names it",
}
TRUE, FALSE = ("true", "1", "yes", "on", ""), ("false", "0", "no", "off")  # a flag without a value is true
PADDLE_DEFAULTS = {"query_max_len": 32, "margin": 0.2}
PADDLE_MATRYOSHKA = {"mrl_weights": [1.0] * 5}  # of 64 to 768 alone, whatever the model's width


def translate(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]], dict[str, str]]:
    """(keys in our names, problems by key, what has no effect and why) of what a user of another trainer gives. Keys of
    ours and unknown ones stay as they are."""
    values = {ALIASES.get(name, name): value for name, value in given.items()}
    if len(values) < len(given):  # under two names, which the configuration reports
        return dict(given), [], {}
    if values.get("colbert_dim") not in ABSENT:
        values |= token_vectors(values)
    unused = {name: why for name, why in WITHOUT_EFFECT.items() if values.pop(name, None) not in ABSENT}
    loss = values.pop("kd_loss_type", None)
    if loss not in ABSENT and values.get("knowledge_distillation") in ABSENT:
        unused["kd_loss_type"] = "without knowledge_distillation"
    translations = TRANSLATIONS | {"knowledge_distillation": lambda value: distillation(value, loss)}
    translations |= {name: partial(with_format, key, values.get(key)) for name, key in FORMATS.items()}
    problems = []
    for name, translation in translations.items():
        if (value := values.pop(name, None)) in ABSENT:
            continue
        try:
            meant = translation(value)
        except ValueError as error:
            problems.append((name, f"{error}, found {shown_value(value)}"))
            continue
        for key in meant.keys() - FORMATS.values():
            if values.get(key) not in (*ABSENT, meant[key]):
                problems.append((name, f"does not fit {key} {shown_value(values[key])}; keep one of the two"))
        values |= meant
    if "do_train" in unused and values.get("fine_tune_type") not in ABSENT:  # a command of PaddleNLP
        values = PADDLE_DEFAULTS | values
        if str(values.get("use_mrl")).lower() in TRUE and values.get("mrl_dims") in ABSENT:
            values = PADDLE_MATRYOSHKA | values
    return values, problems, unused


def is_true(value: Any) -> bool:
    """Raises ValueError."""
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise ValueError("expected true or false")
    return text in TRUE


def token_vectors(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `colbert_dim` says: FlagEmbedding's -1 is the model's hidden size, which several representations have by
    default; without any word of representations the command is of RAG-Retrieval's ColBERT trainer."""
    if str(values["colbert_dim"]) == "-1":
        return {"colbert_dim": None}
    if values.keys() & {"representations", "unified_finetuning"}:
        return {}
    plain = {"query_expansion": False, "skiplist_words": "", "query_instruction": "", "document_instruction": ""}
    given = {name: value for name, value in values.items() if name in plain and value is not None}
    return {"representations": "multi_vector", "mean_maxsim": True} | plain | given


def unified_finetuning(value: Any) -> dict[str, Any]:
    return {"representations": list(REPRESENTATIONS)} if is_true(value) else {}


def train_type(value: Any) -> dict[str, Any]:
    if value not in ("train", "distill"):
        raise ValueError("expected train or distill")
    return {"loss_type": "stella"} if value == "distill" else {}


def neg_nums(value: Any) -> dict[str, Any]:
    if not str(value).isdecimal():
        raise ValueError("expected a whole number of at least 0")
    return {"train_group_size": int(value) + 1}


def distillation(value: Any, loss: Any) -> dict[str, Any]:
    """loss: what `kd_loss_type` says."""
    if not is_true(value):
        return {}
    losses = {
        "kl_div": {"teacher_loss_type": "kl_distillation"},  # beside the loss on positives
        "m3_kd_loss": {"loss_type": "m3_distillation"},
    }
    if loss not in (*ABSENT, *losses):
        raise ValueError(f"expected kl_div or m3_kd_loss with it and not {shown_value(loss)}")
    return losses["kl_div" if loss in ABSENT else loss]


def with_format(key: str, instruction: Any, text: Any) -> dict[str, Any]:
    """The instruction in its format: of "Instruct: {}\\nQuery: {}" all but the query. key: that of the instruction."""
    before, *rest = str(text).replace("\\n", "\n").split("{}")
    if len(rest) != 2 or rest[1]:
        raise ValueError('expected "{}" twice, for instruction and text, and nothing after it')
    return {} if instruction in ABSENT else {key: before + instruction + rest[0]}


TRANSLATIONS = {  # what it means in our keys; raises ValueError
    "train_type": train_type,
    "neg_nums": neg_nums,
    "unified_finetuning": unified_finetuning,
    "fp16": lambda value: {"mixed_precision": "fp16"} if is_true(value) else {},
    "bf16": lambda value: {"mixed_precision": "bf16"} if is_true(value) else {},
}
FORMATS = {  # and the keys of the instructions that they are for
    "query_instruction_format": "query_instruction",
    "passage_instruction_format": "document_instruction",
}
