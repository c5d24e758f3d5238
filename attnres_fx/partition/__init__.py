"""Where to cut a model into blocks and pipeline stages, what that costs, and the stages themselves."""
