"""What consumes an encoder: features, probes, tuning methods, SAViT."""

if __name__ != "miram.finetune":
    raise ImportError("start with `python -m miram …` and import `miram.finetune`, not `finetune`")
