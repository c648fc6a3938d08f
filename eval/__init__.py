"""Evaluation: what a model learned, and what it copied."""
