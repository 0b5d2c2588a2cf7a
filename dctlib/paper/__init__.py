"""What only the notebooks and the pipeline need."""
