"""Tiers: where bytes lie. They know slots as offsets and bytes as buffers, and nobody above."""
