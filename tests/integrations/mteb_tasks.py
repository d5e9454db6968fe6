"""Tasks of MTEB made from a few local texts, English and Chinese: retrieval, reranking, and the likeness of pairs."""

from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from tiny_models import CHINESE, ENGLISH

DOCUMENTS = {f"d{place}": text for place, text in enumerate((*ENGLISH, *CHINESE))}
QUERIES = {f"q{place}": " ".join(text.split()[2:6]) or text[:5] for place, text in enumerate((*ENGLISH, *CHINESE))}
QRELS = {query: {f"d{place}": 2, f"d{(place + 5) % 16}": 1} for place, query in enumerate(QUERIES)}
LISTED = {query: [f"d{(place + step) % 16}" for step in range(8)] for place, query in enumerate(QUERIES)}
PAIRS = [(ENGLISH[place], ENGLISH[place + 1], place * 7 % 6) for place in range(9)]


def about(name: str, kind: str, main_score: str) -> TaskMetadata:
    where = {"path": "local", "revision": "1"}
    more = {"category": "t2t", "eval_splits": ["test"], "eval_langs": ["eng-Latn", "zho-Hans"]}
    return TaskMetadata(name=name, description=name, dataset=where, type=kind, main_score=main_score, **more)


def rows(texts: dict[str, str]) -> Dataset:
    return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})


class LocalRetrieval(AbsTaskRetrieval):
    metadata = about("LocalRetrieval", "Retrieval", "ndcg_at_10")
    top_ranked = None

    def load_data(self, num_proc=None, **kwargs):
        split = {"queries": rows(QUERIES), "corpus": rows(DOCUMENTS), "relevant_docs": QRELS}
        self.dataset = {"default": {"test": split | {"top_ranked": self.top_ranked}}}
        self.data_loaded = True


class LocalReranking(LocalRetrieval):
    metadata = about("LocalReranking", "Reranking", "ndcg_at_10")
    top_ranked = LISTED


class LocalSts(AbsTaskSTS):
    metadata = about("LocalSts", "STS", "cosine_spearman")

    def load_data(self, num_proc=None, **kwargs):
        first, second, scores = zip(*PAIRS, strict=True)
        self.dataset = {"test": Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})}
        self.data_loaded = True
