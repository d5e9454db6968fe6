"""An HTTP server that answers the rerank requests of Cohere, Jina and text-embeddings-inference clients."""
