"""Turns text into batches: sources, token cache, rows, and a batch as a function of seed and step.

sources, assets  resolve the name of a source to files
readers          split files into documents: text, JSON lines, CSV, TSV, Parquet, data sets of `datasets`
catalog, split   positions of the documents, and the held-out split
encode           converts documents to token ids, by `data.kind`
corpus, build    the token cache; `labelled` for labelled texts
local_engine     runs scans and tokenization in processes of this machine; `ray_engine` on a Ray cluster
shared_cache     the token cache in an object store
rows, packing    rows and batches of token ids; `masking` for masked rows
kinds            `open_source(config)` selects the reader for `data.kind`
"""
