"""From a model and prompts to ranked vectors."""
