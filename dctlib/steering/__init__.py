"""Hooks, generation and scores under steering vectors."""
