"""A trained reranker in other formats, checked against the one it was made from."""
