"""Policies: their contract, models beside them, and an exact simulator of what they are worth."""
