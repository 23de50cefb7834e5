"""Eviction policies: which block is worth least. They know keys, and nobody above."""
