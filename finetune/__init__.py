"""What consumes an encoder: features, probes."""

if __name__ != "miram.finetune":
    raise ImportError("start with `python -m miram …` and import `miram.finetune`, not `finetune`")
