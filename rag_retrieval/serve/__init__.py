"""An HTTP server for rerankers, embedders and indexes that speaks as the services speak whose clients people have."""
