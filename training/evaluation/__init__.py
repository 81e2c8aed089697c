"""Evaluation: what generated images are worth, as pure functions of their features."""
