"""Corpora to shards to batches."""
