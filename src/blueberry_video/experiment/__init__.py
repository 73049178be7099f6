"""Results of a run: run folder, metrics, loggers, checkpoints, verdicts, report."""
