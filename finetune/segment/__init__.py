"""Segmentation: an encoder and a decoder, or a network of its own, from training crops to masks of whole films."""
