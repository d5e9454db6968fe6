"""What a folder with all three representations answers, in every way that it is asked, as JSON values.

As a script, for a process without torch: `python exported_answers.py MODEL CORPUS WORK` prints them.
"""

import importlib.abc
import json
import sys
from pathlib import Path

PAIRS = [("what boils at sea level?", "Water boils at 100 degrees Celsius."), ("水在多少度沸腾?", "北京是中国的首都。"),
         ("fever", ""), ("", "Fever, cough and tiredness. " * 40)]  # fmt: skip
ALL = ("dense", "lexical", "multi_vector")
REFUSED = ("torch", "transformers", "onnx", "accelerate", "sentence_transformers")


class Refuse(importlib.abc.MetaPathFinder):
    """Whoever imports one of these is shown in the traceback."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} is imported")


def answers(model: str, corpus: str, work: Path) -> dict:
    """corpus: a file of documents. work: a new folder."""
    from rag_retrieval import ColBERT, Embedder, Reranker
    from rag_retrieval.cli import main

    queries, documents = ([pair[side] for pair in PAIRS] for side in (0, 1))
    with Embedder(model, device="cpu") as embedder:
        found = embedder.encode_queries(queries, outputs=ALL)
        scores, why = embedder.compute_score(PAIRS), embedder.explain(*PAIRS[0])
    told = {
        "dense": found.dense.tolist(),
        "lexical": list(found.lexical),
        "multi_vector": [vectors.tolist() for vectors in found.multi_vector],
        "scores": {name: getattr(scores, name).tolist() for name in (*ALL, "ensemble")},
        "explain": [why.query_tokens, why.document_tokens, why.similarity.tolist(), why.common],
        "ColBERT": ColBERT.from_pretrained(model).compute_score(PAIRS, query_max_len=64, passage_max_len=64),
    }
    with Reranker(model, device="cpu") as reranker:
        told["rerank"] = [[result.doc_id, result.score] for result in reranker.rerank(queries[0], documents)]
    index = ["--output", str(work / "index")]
    kept = ["--embedder", model, "--device", "cpu", "--representations", ",".join(ALL)]
    assert main(["index", "--corpus", corpus, *index, *kept]) == 0
    Path(work / "new.jsonl").write_text(json.dumps({"id": "new", "text": "Water and sugar make oxygen."}))
    assert main(["index", *index, "--add", str(work / "new.jsonl"), "--device", "cpu"]) == 0
    asked = ["--index", str(work / "index"), "--query", queries[0], "--output", str(work / "found.json")]
    assert main(["search", *asked, "--device", "cpu", "--reranker", model]) == 0
    results = json.loads((work / "found.json").read_text())["results"]
    told["search"] = {result["doc_id"]: result["scores"] for result in results}
    # another index, of which only the order is looked at: codes amplify the last bits of vectors
    coded = ["--token_precision", "residual4", "--token_candidates", "tokens", "--bm25", "false"]
    assert main(["index", "--corpus", corpus, "--output", str(work / "coded"), *kept, *coded]) == 0
    return told


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    json.dump(answers(sys.argv[1], sys.argv[2], Path(sys.argv[3])), sys.stdout)
