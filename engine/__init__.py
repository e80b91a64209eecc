"""What every run stands on: config, run folder, checkpoint, loop, metrics, report. Imports nothing above itself."""

if __name__ != "miram.engine":
    raise ImportError("start with `python -m miram …` and import `miram.engine`, not `engine`")
