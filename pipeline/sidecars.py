"""Placeholder."""

from pipeline.ledger import Manifest
from pipeline.storage import Storage


def write_sidecars(storage: Storage, manifest: Manifest) -> None:
    """Nothing yet."""
