"""Federated tuning: sites share what learns, never images."""
