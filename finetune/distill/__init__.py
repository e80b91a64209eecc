"""Distillation: a small encoder that learns from a large one."""
