"""Causal control: what its chapter measures and judges."""
