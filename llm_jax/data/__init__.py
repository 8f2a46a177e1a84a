"""Turns text into batches: sources, token cache, rows, and a batch as a function of seed and step.

sources, assets  the files that a name stands for
readers          files as documents: text, JSON lines, CSV, TSV, Parquet, data sets of `datasets`
catalog, split   where every document is, and which ones are held out
encode           documents as token ids, by `data.kind`
corpus, build    the token cache; labelled: the same for texts with a label
rows, packing    token ids as rows and batches; masking: rows with hidden tokens
kinds            what `data.kind` decides: `open_source(config)`
"""
