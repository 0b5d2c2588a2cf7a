"""Language models: loading, parts, chat format. The only room that knows model families."""
