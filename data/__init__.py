"""Mammograms -> shards -> batches. Imports nothing of the project but `miram.engine`."""

if __name__ != "miram.data":
    raise ImportError("start with `python -m miram data …` and import `miram.data`, not `data`")
