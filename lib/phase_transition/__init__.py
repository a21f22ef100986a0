"""The phase transition: what its chapter measures and judges."""
