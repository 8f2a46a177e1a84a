"""Sweeps, findings with their intervals and verdicts, comparisons and reports of runs."""
