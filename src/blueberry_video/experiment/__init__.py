"""What a run leaves behind: folder, metrics, verdicts, report."""
