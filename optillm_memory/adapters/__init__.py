"""Other ways in than the host's chat completions."""
