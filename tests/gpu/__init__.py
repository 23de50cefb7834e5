"""Tests for a machine with a CUDA device, cupy and torch; skipped elsewhere."""
