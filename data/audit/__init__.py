"""Whether anything that was written tells whose images it holds."""
