"""One request from begin to finish."""
