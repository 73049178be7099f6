"""Launching: command line, dry run, memory estimate, environment check, one or several processes."""
