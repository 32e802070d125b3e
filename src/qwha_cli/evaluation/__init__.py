"""Scoring a live model: running text, held-out answers, exact match and lm-eval's tasks."""
