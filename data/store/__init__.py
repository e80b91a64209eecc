"""Bytes of shards, wherever they lie: names of places, local files, ranges behind URLs."""
