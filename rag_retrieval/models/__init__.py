"""Rerankers as modules: pair encoding, batches, the two model types, saving and loading."""
