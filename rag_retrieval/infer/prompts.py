"""The settings of a decoder that was saved by somebody else: from its chat template, or from the known prompts.

What a reader would get wrong: a decoder scored with another prompt than it was trained on is no error, only a worse
ranking. So there is no default: a prompt is the caller's, the folder's own, or that of a model which the folder's
files name (`known_prompts.json`), and the folder's own name is no evidence.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml
from jinja2 import TemplateError

from rag_retrieval.infer.backend import BackendOptions
from rag_retrieval.infer.model_kind import ModelFiles
from rag_retrieval.models.decoder_template import INSTRUCTION
from rag_retrieval.models.model_files import FORMAT_NAMES
from rag_retrieval.models.model_loading import load_tokenizer
from rag_retrieval.models.pair_encoding import bare, tokenize
from rag_retrieval.models.yes_no_prompt import check_instruction

KNOWN_PROMPTS = Path(__file__).with_name("known_prompts.json")
QUERY, DOCUMENT = "query-goes-here", "document-goes-here"  # marks that survive a template's own trimming


@dataclass(frozen=True)
class KnownPrompt:
    """How one model asks. Formats as of LLMDecoder, `{instruction}` for the instruction.

    models, source: for the reader. A folder has this prompt where config.json says `model_type` and, besides, one of
    `names` stands in its `_name_or_path` or in the card's base_model or a heading, or one of `words` in its chat
    template or card (a mere mention in a card is none: cards compare themselves with other models).
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
        named, said = names_in(files), files.card + files.chat_template
        return any(name in named for name in self.names) or any(words in said for words in self.words)


def names_in(files: ModelFiles) -> str:
    """What the files say that the model is, or was made from: one name in a line."""
    matter = files.card.split("---")[1] if files.card.startswith("---") else ""
    try:
        bases = (yaml.safe_load(matter) or {}).get("base_model") or []
    except (yaml.YAMLError, AttributeError):
        bases = []
    headings = [line for line in files.card.splitlines() if line.startswith("# ")]
    bases = [bases] if isinstance(bases, str) else bases
    return "\n".join(map(str, [files.config.get("_name_or_path", ""), *bases, *headings]))


@cache
def known_prompts() -> list[KnownPrompt]:
    entries = json.loads(KNOWN_PROMPTS.read_text(encoding="utf-8"))
    return [KnownPrompt(**entry) for entry in entries.values()]


def with_prompt(files: ModelFiles, options: BackendOptions) -> BackendOptions:
    """The options with all that an LLMDecoder of this folder needs; what the caller gave stays.

    Raises ValueError for a decoder whose prompt is neither given nor known.
    """
    head = options.head or ("yes_no" if files.answers else "scalar")
    if all(getattr(options, name) is not None for name in FORMAT_NAMES):
        return replace(options, head=head)
    found = from_chat_template(files, options) or from_known_prompts(files, options.instruction)
    if found is None and options.head == "yes_no":
        return options  # asks the question of Qwen3-Reranker
    if found is None:
        raise ValueError(missing_prompt(files))
    if head == "scalar":
        found = without_questions(found, options.instruction)
        options = replace(options, instruction=None)
    given = {name: value for name, value in vars(options).items() if value is not None}
    return replace(options, **(found | given | {"head": head}))


def missing_prompt(files: ModelFiles) -> str:
    needs = "query_format, document_format, seq and special_token"
    if files.answers:
        needs += ', with yes_token and no_token, or head="yes_no" alone to ask the question of Qwen3-Reranker'
    return (
        f"{files.path}: a decoder ({files.architecture or files.config.get('model_type')}) that does not say which "
        f"prompt it was trained with; give {needs}. Known are {', '.join(prompt.models for prompt in known_prompts())}"
    )


def from_known_prompts(files: ModelFiles, instruction: str | None) -> dict[str, str] | None:
    prompt = next((prompt for prompt in known_prompts() if prompt.recognises(files)), None)
    if prompt is None:
        return None
    found = {name: getattr(prompt, name) for name in (*FORMAT_NAMES, "yes_token", "no_token")}
    if instruction is not None and prompt.instructed_query_format:
        found["query_format"] = prompt.instructed_query_format
    return found if prompt.instruction is None else found | {"instruction": prompt.instruction}


def without_questions(found: dict[str, str], instruction: str | None) -> dict[str, str]:
    """For a classification head: the formats alone, the instruction filled in."""
    check_instruction(found, instruction)
    text = found.get("instruction", "") if instruction is None else instruction
    return {name: found[name].replace(INSTRUCTION, text) for name in FORMAT_NAMES}


def from_chat_template(files: ModelFiles, options: BackendOptions) -> dict[str, str] | None:
    """The formats that a chat template with the roles query and document writes; None for other templates.

    sentence-transformers and vLLM read such templates, and give an instruction as the system's message. The answers
    are those of the folder's LogitScore; without it only a classification head can be served.
    """
    if not files.chat_template or (files.answers and files.logit_score is None):
        return None
    tokenizer = load_tokenizer(files.path, options.trust_remote_code)
    instruction = files.instruction if options.instruction is None else options.instruction
    messages = [{"role": "query", "content": QUERY}, {"role": "document", "content": DOCUMENT}]
    if instruction is not None:
        messages.insert(0, {"role": "system", "content": INSTRUCTION})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None
    if [text.count(mark) for mark in (QUERY, DOCUMENT)] != [1, 1] or text.index(QUERY) > text.index(DOCUMENT):
        return None
    before, rest = text.split(QUERY)
    between, after = rest.split(DOCUMENT)
    formats = dict(query_format=before + "{}", seq=between, document_format="{}", special_token=after)
    if INSTRUCTION in text:
        formats["instruction"] = instruction
    return formats | (answers_of(files, tokenizer) if files.logit_score is not None else {})


def answers_of(files: ModelFiles, tokenizer) -> dict[str, str]:
    """Texts of LogitScore's tokens. Raises ValueError for one that is not tokenized as itself."""
    own = bare(tokenizer)
    answers = {"no_token": ""}
    for name, key in (("yes_token", "true_token_id"), ("no_token", "false_token_id")):
        token = files.logit_score.get(key)
        if token is None and name == "no_token":
            continue
        answers[name] = own.decode([token])
        if tokenize(own, [answers[name]]) != [[token]]:
            raise ValueError(
                f"{files.path}: LogitScore reads token {token}, which no text gives; give yes_token and no_token"
            )
    return answers
