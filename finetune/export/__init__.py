"""Export: what a run made, in the formats of others, each checked against it."""
