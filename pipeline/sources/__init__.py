"""Corpora: each kind of source is a class with `plan()` and `read(unit)`; `registry.make_source` makes it."""
