"""Violence against the NVMe tier: failing I/O, power cuts, flipped bits; each a test and a soak."""
