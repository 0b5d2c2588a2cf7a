"""Judges, selection on validation prompts, statistics."""
