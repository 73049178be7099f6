"""Metrics, baselines, probes and few-label fine-tuning."""
