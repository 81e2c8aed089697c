"""Spec in, processes out."""
