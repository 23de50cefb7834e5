"""Tests of the brain: a model beside the machine, and the promises as small examples."""
