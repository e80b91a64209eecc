"""Classification: labels, tuning and probing under one protocol, the model that comes of it."""
