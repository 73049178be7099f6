"""Metrics, trivial predictors, probes and few-label fine-tuning."""
