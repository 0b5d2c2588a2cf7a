"""Remembered results, sweeps, and Ray clusters."""
