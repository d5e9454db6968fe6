"""The files by which sentence-transformers (6) opens a decoder with its formats, and servers cut pairs where we do.

    chat_template.jinja                 the text of a pair, for messages of the roles query and document (vLLM too)
    modules.json, sentence_bert_config.json, config_sentence_transformers.json
                                        what reads the score, up to how many tokens, and that it stays raw
    1_LogitScore/config.json            of a yes/no head: the ids of its two tokens

The file also holds the model's own chat template: ours comes before it and applies only where both roles are there.
That text is tokenized as a whole; `decoder_template` says why its tokens are ours.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rag_retrieval.models.decoder_template import INSTRUCTION, missing_bos
from rag_retrieval.models.pair_encoding import PairEncoder, split_format, tokenize
from rag_retrieval.models.prompts import answer_tokens
from rag_retrieval.models.settings import RerankerSettings

IDENTITY = "torch.nn.modules.linear.Identity"
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
LOGIT_SCORE = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
LOGIT_FOLDER = "1_LogitScore"

PAIR_TEMPLATE = """{{#- rag_retrieval: the text of a query and a document -#}}
{{%- set queries = messages | selectattr("role", "equalto", "query") | map(attribute="content") | list -%}}
{{%- set documents = messages | selectattr("role", "equalto", "document") | map(attribute="content") | list -%}}
{{%- if queries and documents -%}}
{{{{- {before} + queries[0] + {between} + documents[0] + {after} -}}}}
"""
BEGINNING = PAIR_TEMPLATE.format(before="", between="", after="").partition("\n")[0]
OWN_TEMPLATE, END = "{%- else +%}", "{%+ endif %}"  # the plus signs keep line breaks of the template between them


def write_decoder_files(folder: Path, encoder: PairEncoder, settings: RerankerSettings) -> None:
    """Beside the weights, config and tokenizer that lie in `folder`. encoder, settings: of an LLMDecoder."""
    (folder / "chat_template.jinja").write_text(chat_template(encoder, settings), encoding="utf-8")
    modules = [module("", TRANSFORMER, 0)]
    if settings.head == "yes_no":
        modules.append(module(LOGIT_FOLDER, LOGIT_SCORE, 1))
        yes, no = answer_tokens(encoder.tokenizer, settings.yes_token, settings.no_token)
        (folder / LOGIT_FOLDER).mkdir(exist_ok=True)
        write(folder / LOGIT_FOLDER / "config.json", {"true_token_id": yes, "false_token_id": no})
    write(folder / "modules.json", modules)
    write(folder / "sentence_bert_config.json", transformer_config(settings))
    write(folder / "config_sentence_transformers.json", {"model_type": "CrossEncoder", "activation_fn": IDENTITY})


def write_encoder_files(folder: Path, settings: RerankerSettings) -> None:
    """For servers alone, which cut pairs by it: sentence-transformers opens an encoder without further files."""
    write(folder / "sentence_bert_config.json", {"max_seq_length": settings.max_len, "do_lower_case": False})


def module(path: str, kind: str, place: int) -> dict:
    return {"idx": place, "name": str(place), "path": path, "type": kind}


def transformer_config(settings: RerankerSettings) -> dict:
    answers = settings.head == "yes_no"
    forward = {"method": "forward", "method_output_name": "logits"}
    return {
        "max_seq_length": settings.max_len,
        "transformer_task": "text-generation" if answers else "sequence-classification",
        "modality_config": {"text": forward, "message": forward | {"format": "flat"}},
        "module_output_name": "causal_logits" if answers else "scores",
    }


def write(path: Path, values: dict | list) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def chat_template(encoder: PairEncoder, settings: RerankerSettings) -> str:
    """The template of a pair, and after it the one that the tokenizer had without it."""
    before, between, after = (quoted(text) for text in fixed_texts(encoder, settings))
    pair = PAIR_TEMPLATE.format(before=before, between=between, after=after)
    return pair + OWN_TEMPLATE + own_template(encoder.tokenizer) + END


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template without a pair's before it; nothing where it has none."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):  # several of them, by name
        template = template.get("default", "")
    if template.startswith(BEGINNING):
        return template.partition(OWN_TEMPLATE)[2].removesuffix("\n").removesuffix(END)
    return template.removesuffix("\n")  # Jinja ignores it at the end of a file, but not before our end


def quoted(text: str) -> str:
    """A Jinja string: it takes the escapes of JSON, but for those of characters beyond U+FFFF."""
    return json.dumps(text, ensure_ascii=False)


def fixed_texts(encoder: PairEncoder, settings: RerankerSettings) -> tuple[str, str, str]:
    """The text before the query, between query and document, and after the document.

    SentencePiece begins a text with the mark of a space, but not what follows bos in it: where bos is in the text,
    a space after it gives the mark.
    """
    before_query, after_query = split_format("query_format", settings.query_format)
    before_document, after_document = split_format("document_format", settings.document_format)
    texts = before_query, after_query + settings.seq + before_document, after_document + settings.special_token
    if settings.instruction is not None:
        texts = tuple(text.replace(INSTRUCTION, settings.instruction) for text in texts)
    before, between, after = texts
    tokenizer, fast = encoder.tokenizer, encoder.fast_tokenizer
    bos = "".join(tokenizer.convert_ids_to_tokens(missing_bos(tokenizer, fast, before)))
    wanted = encoder.encode([("a", "b")])[0].ids.tolist()
    starts = bos + before, f"{bos} {before}"
    matching = (start for start in starts if tokenize(fast, [f"{start}a{between}b{after}"])[0] == wanted)
    return next(matching, starts[0]), between, after
