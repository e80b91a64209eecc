"""Encoder, masking, multi-scale decoders and the pretraining stage."""

if __name__ != "miram.pretrain":
    raise ImportError("start with `python -m miram.pretrain …` and import `miram.pretrain`, not `pretrain`")
