"""Weights that were trained elsewhere: files read, key names translated, encoders started from them."""
