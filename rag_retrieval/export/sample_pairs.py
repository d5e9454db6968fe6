"""Pairs of our own to compare an exported model with the model it was made from, where no data are given.

What a reader would get wrong: lengths matter more than texts. A graph that was traced at one length, or that pads
wrongly, is right for pairs like the traced ones and for no others, so these go from one token to beyond the limit.
"""

from itertools import cycle, islice

from rag_retrieval.models.pair_encoding import PairEncoder

QUERIES = (
    "How do I read a file line by line in Python?",
    "What are the first signs of the flu?",
    "When does a file handle get closed?",
    "which river runs through Paris",
    "如何逐行读取一个文件？",
    "感冒有哪些早期症状？",
    "怎样解除实例与安全组的绑定？",
    "水在高山上多少度沸腾",
)
SENTENCES = (
    "Iterating over an open file gives its lines one after another, each with its line break. ",
    "Fever, cough, a sore throat and tiredness begin within two days and last for about a week. ",
    "打开文件以后用循环读取，每次得到一行，末尾带有换行符。",
    "The file is closed when the block ends, even if an error was raised inside it. ",
    "发烧、咳嗽、咽痛和乏力通常在一两天内出现，大约一周后好转。",
    "At 3,000 m water boils at 90 °C; the Seine has nothing to do with it. ",
    "先调用查询接口确认状态为成功，再提交解绑请求，一次只能解绑一个安全组。",
    "See also: `open(path, encoding='utf-8')`, io.TextIOWrapper and os.fsync(). ",
)
STEPS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)  # tokens of a document; then up to the limit


def sample_pairs(encoder: PairEncoder) -> list[tuple[str, str]]:
    """(query, document) pairs: documents of one token, of lengths between, and of more than the model reads.

    For every length there are two pairs, with other queries and other sentences in front.
    """
    budget = encoder.budget
    lengths = [tokens for tokens in STEPS if tokens < budget] + [budget, 2 * budget]
    queries = cycle(QUERIES)
    pairs = [("a", "b"), ("", SENTENCES[0])]
    for place, tokens in enumerate(lengths):
        for start in (place, place + len(SENTENCES) // 2):
            pairs.append((next(queries), document_of(encoder, tokens, start)))
    return pairs


def document_of(encoder: PairEncoder, tokens: int, start: int) -> str:
    """Sentences in turn from number `start`, cut to about `tokens` tokens."""
    text = ""
    for sentence in islice(cycle(SENTENCES), start, start + tokens + len(SENTENCES)):
        text += sentence
        found = len(encoder.document_ids([text])[0])
        if found >= tokens:
            break
    return text[: max(1, round(len(text) * tokens / found))]
