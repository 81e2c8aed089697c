"""Batches to a model to pictures."""
