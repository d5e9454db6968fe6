"""What a language model is asked about a pair: the question by language, the prompts of known rerankers, the answers.

A decoder with another prompt than it was trained with gives no error, only a worse ranking. So its prompt is the
caller's, the folder's own chat template for a query and a document, or that of a model which the folder's files name
(`known_prompts.json`); the folder's name decides nothing. Nothing here imports torch.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from rag_retrieval.models.decoder_template import INSTRUCTION
from rag_retrieval.models.pair_encoding import bare, tokenize
from rag_retrieval.models.settings import FORMAT_NAMES, ModelFiles, expect, parsing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN_PROMPTS = Path(__file__).with_name("known_prompts.json")
PLACES = ("{query}", "{document}")
QUERY, DOCUMENT = "query-goes-here", "document-goes-here"  # marks that survive a template's own trimming
TEMPLATE_SECONDS = 2  # of CPU time that a folder's chat template may run


# ---- the question, by language --------------------------------------------------------------------------


class Prompt(NamedTuple):
    """user: the text with {query} and, after it, {document}: documents of one query then share its computation.
    yes_token, no_token: the answers, each one token of the model's tokenizer."""

    system: str
    instruction: str
    user: str
    yes_token: str
    no_token: str


USER = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"

# English is the prompt of the Qwen3-Reranker checkpoints, word for word: another one changes their scores
PROMPTS = {
    "en": Prompt(
        system="Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".',
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        user=USER,
        yes_token="yes",
        no_token="no",
    ),
    "zh": Prompt(
        system="请根据给出的 Instruct 和 Query，判断 Document 是否符合要求。注意：只能回答“是”或“否”。",
        instruction="给定一个搜索查询，找出能够回答该查询的段落",
        user=USER,
        yes_token="是",
        no_token="否",
    ),
}

# How Qwen3's chat template lays out a system and a user text with thinking switched off, up to the answer
QWEN3_CHAT = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
QWEN3_MARKUP = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def check_places(user: str) -> None:
    """Raises ValueError for a user text without the places of query and document in this order."""
    if [user.count(place) for place in PLACES] != [1, 1] or user.index(PLACES[0]) > user.index(PLACES[1]):
        raise ValueError(
            f"expected {{query}} and, after it, {{document}} in the prompt, each once; found {json.dumps(user)}"
        )


def chat_formats(tokenizer: "PreTrainedTokenizerBase", system: str, user: str) -> dict[str, str]:
    """The four format settings of an LLMDecoder for a system text and a user text with {query} and {document}.

    They are laid out by the tokenizer's chat template, thinking switched off, up to where the answer begins; or,
    where it has no template for such messages but Qwen3's markup, as Qwen3 does. Raises ValueError where it has
    neither, and for a user text without the two places in this order.
    """
    check_places(user)
    text = chat_text(tokenizer, system, user)
    if text is None and set(QWEN3_MARKUP) <= tokenizer.get_vocab().keys():
        text = QWEN3_CHAT.replace("{system}", system).replace("{user}", user)
    if text is None:
        raise ValueError(
            "the tokenizer has no chat template that takes a system and a user message; give query_format, "
            "document_format, seq and special_token"
        )
    before, between, after = re.split(r"\{query\}|\{document\}", text)
    return {"query_format": before + "{}", "document_format": "{}", "seq": between, "special_token": after}


def chat_text(tokenizer: "PreTrainedTokenizerBase", system: str, user: str) -> str | None:
    """The chat up to where the answer begins, with the places in it; None where the template gives no such text.

    A template may refuse a system message, or trim or leave out what it is given.
    """
    in_one = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
    with_system = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    for messages in (with_system, in_one) if system else (in_one,):
        text = render(tokenizer, messages)
        if text is not None and system in text and [text.count(place) for place in PLACES] == [1, 1]:
            return text
    return None


# ---- chat templates -------------------------------------------------------------------------------------


def render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> str | None:
    """The text of the messages up to where an answer begins; None without a template, and where it refuses them.

    Raises ValueError for a template that is damaged or takes more than TEMPLATE_SECONDS.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    if not tokenizer.chat_template:
        return None
    name = f"{tokenizer.name_or_path}: its chat template"
    try:
        check_no_powers(tokenizer.get_chat_template())
        with time_limit(name, TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
    except TemplateSyntaxError as error:
        raise ValueError(f"{name} is damaged, line {error.lineno}: {error.message}; copy it again") from error
    except TemplateError:  # raise_exception of a template that takes no such message
        return None
    except TimeoutError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # whatever its expressions raise: a template is a program
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} fails ({type(error).__name__}: {reason:.200}); copy it again") from error


def check_no_powers(template: str) -> None:
    """Raises ValueError for an expression with a power: 9**9**9 takes forever in one step of Python, which nothing in
    this process can end. Every other one takes time in proportion to the memory that it fills."""
    from jinja2 import Environment

    before = ""
    for line, kind, text in Environment().lex(template):
        if text == "**" and kind == "operator" and before not in ("(", ","):  # after these it is `f(**options)`
            raise ValueError(f"line {line} computes a power, which no chat template needs")
        before = before if kind == "whitespace" else text


@contextmanager
def time_limit(name: str, seconds: float) -> Iterator[None]:
    """TimeoutError when Python code of this thread takes more CPU time: a template may loop without an end."""
    end, before = time.thread_time() + seconds, sys.gettrace()

    def trace(frame, event, argument):
        if time.thread_time() > end:
            raise TimeoutError(f"{name} runs for more than {seconds} seconds; it may have an endless loop")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def prompt_of_template(
    files: ModelFiles, tokenizer: "PreTrainedTokenizerBase", instruction: str | None
) -> dict[str, str] | None:
    """The formats that a chat template with the roles query and document writes; None for other templates.

    sentence-transformers and vLLM read such templates, and give an instruction as the system's message. The answers
    are those of the folder's LogitScore; without it only a classification head can be served.
    """
    if not files.chat_template or (files.is_language_model and files.logit_score is None):
        return None
    instruction = files.default_prompt if instruction is None else instruction
    messages = [{"role": "query", "content": QUERY}, {"role": "document", "content": DOCUMENT}]
    if instruction is not None:
        messages.insert(0, {"role": "system", "content": INSTRUCTION})
    text = render(tokenizer, messages)
    if text is None or [text.count(mark) for mark in (QUERY, DOCUMENT)] != [1, 1]:
        return None
    if text.index(QUERY) > text.index(DOCUMENT):
        return None
    before, rest = text.split(QUERY)
    between, after = rest.split(DOCUMENT)
    formats = dict(query_format=before + "{}", seq=between, document_format="{}", special_token=after)
    if INSTRUCTION in text:
        formats["instruction"] = instruction
    return formats | (answers_of(files, tokenizer) if files.logit_score is not None else {})


def answers_of(files: ModelFiles, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Texts of LogitScore's tokens. Raises ValueError for one that is not tokenized as itself."""
    own, answers, place = bare(tokenizer), {"no_token": ""}, f"{files.path}: the settings of LogitScore"
    for name, key in (("yes_token", "true_token_id"), ("no_token", "false_token_id")):
        with parsing(place):
            token = expect(files.logit_score, key, int)
            if token is None and name == "yes_token":
                raise KeyError(key)
            if token is None:
                continue
            answers[name] = own.decode([token])
        if tokenize(own, [answers[name]]) != [[token]]:
            raise ValueError(
                f"{files.path}: LogitScore reads token {token}, which no text gives; give yes_token and no_token"
            )
    return answers


# ---- known prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownPrompt:
    """How one model asks. Formats as of LLMDecoder, `{instruction}` for the instruction.

    models, source: for the reader. A folder has this prompt where config.json says `model_type` and, besides, one of
    `names` stands in its `_name_or_path` or in the card's base_model or a heading, or one of `words` in its chat
    template or card (a mere mention in a card does not count: cards compare models).
    instructed_query_format: for a model that is asked without an instruction unless the caller gives one. no_token:
    "" where yes is read alone.
    """

    models: str
    source: str
    model_type: str
    names: list[str]
    words: list[str]
    query_format: str
    seq: str
    document_format: str
    special_token: str
    yes_token: str
    no_token: str
    instruction: str | None = None
    instructed_query_format: str | None = None

    def recognises(self, files: ModelFiles) -> bool:
        if files.config.get("model_type") != self.model_type:
            return False
        named, texts = names_in(files), files.card + files.chat_template
        return any(name in named for name in self.names) or any(words in texts for words in self.words)


@cache
def known_prompts() -> list[KnownPrompt]:
    entries = json.loads(KNOWN_PROMPTS.read_text(encoding="utf-8"))
    return [KnownPrompt(**entry) for entry in entries.values()]


def known_prompt(files: ModelFiles, instruction: str | None) -> dict[str, str] | None:
    prompt = next((prompt for prompt in known_prompts() if prompt.recognises(files)), None)
    if prompt is None:
        return None
    texts = {name: getattr(prompt, name) for name in (*FORMAT_NAMES, "yes_token", "no_token")}
    if instruction is not None and prompt.instructed_query_format:
        texts["query_format"] = prompt.instructed_query_format
    return texts if prompt.instruction is None else texts | {"instruction": prompt.instruction}


class FrontMatter(yaml.SafeLoader):
    """Refuses aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def names_in(files: ModelFiles) -> str:
    """What the files say that the model is, or was made from: one name in a line."""
    matter = files.card.split("---")[1] if files.card.startswith("---") else ""
    try:
        values = yaml.load(matter, Loader=FrontMatter)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an impossible date or number
        values = None
    bases = values.get("base_model") if isinstance(values, dict) else None
    bases = bases if isinstance(bases, list) else [bases]
    headings = [line for line in files.card.splitlines() if line.startswith("# ")]
    named = [files.config.get("_name_or_path"), *bases, *headings]
    return "\n".join(name for name in named if isinstance(name, str))


def own_prompt(
    files: ModelFiles, tokenizer: "PreTrainedTokenizerBase", instruction: str | None
) -> dict[str, str] | None:
    """The texts that the model was trained with, as its files say; None where they do not."""
    return prompt_of_template(files, tokenizer, instruction) or known_prompt(files, instruction)


# ---- the answers ----------------------------------------------------------------------------------------

# Of other prompts, to suggest where a tokenizer makes several tokens of the given ones
ANSWERS = (
    ("yes", "no"), ("Yes", "No"), ("YES", "NO"), (" yes", " no"), (" Yes", " No"), ("true", "false"),
    ("True", "False"), ("是", "否"), ("是", "不"), ("对", "错"), ("1", "0"), ("A", "B"),
)  # fmt: skip


def answer_tokens(tokenizer: "PreTrainedTokenizerBase", yes_token: str, no_token: str) -> tuple[int, int | None]:
    """The ids of the two answers; None for a no_token of "", where yes is read alone. Raises ValueError unless each
    is one token, other than the other."""
    ids = [single_token(tokenizer, text) for text in (yes_token, no_token)]
    for name, text, token in zip(("yes_token", "no_token"), (yes_token, no_token), ids, strict=True):
        if token is None and (name, text) != ("no_token", ""):
            pieces = tokenizer.tokenize(text)
            raise ValueError(
                f"{name} {text!r} must be one token, and this tokenizer makes {len(pieces)} of it "
                f"({', '.join(pieces)}); {alternatives(tokenizer)}"
            )
    if ids[0] == ids[1]:
        raise ValueError(f"yes_token {yes_token!r} and no_token {no_token!r} are the same token; give two answers")
    return ids[0], ids[1]


def single_token(tokenizer: "PreTrainedTokenizerBase", text: str) -> int | None:
    """The id of a text that is exactly one known token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def alternatives(tokenizer: "PreTrainedTokenizerBase") -> str:
    usable = [
        f"{yes!r} and {no!r}"
        for yes, no in ANSWERS
        if None not in (single_token(tokenizer, yes), single_token(tokenizer, no))
    ]
    return f"one token each here: {', '.join(usable)}" if usable else "give two answers that are one token each"
