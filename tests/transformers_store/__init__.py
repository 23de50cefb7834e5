"""PrefixStore over a real daemon, with tiny models that transformers computes on the CPU."""
