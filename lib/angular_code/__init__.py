"""The angular code: what its chapter measures, maps and judges."""
