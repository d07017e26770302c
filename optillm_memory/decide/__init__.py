"""What to do with a request: the holdout."""
