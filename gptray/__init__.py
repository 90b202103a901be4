"""gptray: train, tune, evaluate, serve and batch-run GPT language models on Ray."""

__version__ = "0.1.0"
