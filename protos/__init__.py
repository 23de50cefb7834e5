"""The wire schema, and the code generated from it."""
