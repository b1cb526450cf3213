"""From sources of documents to batches of rows: sources, tokenizer, store, rows, loader."""
