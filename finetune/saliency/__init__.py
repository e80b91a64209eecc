"""Maps of what parts of an image are worth to a model, and their pictures."""
