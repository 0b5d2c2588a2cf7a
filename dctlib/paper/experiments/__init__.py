"""The experiments behind the notebooks."""
