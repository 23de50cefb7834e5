"""End to end: a real daemon in a process of its own, and real clients through both doors."""
