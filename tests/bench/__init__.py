"""Benchmarks that need more than a processor, each one command."""
