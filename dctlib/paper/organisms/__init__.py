"""Model organisms: training, tasks, secrets."""
