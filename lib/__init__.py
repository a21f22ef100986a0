"""What the chapters share: extraction, interventions, metrics, statistics and verdicts."""
