"""Fixtures shared by all tests; its presence also puts tests/ on the path, for `synthetic_shards`."""
