"""The norm code: what its chapter measures and judges."""
