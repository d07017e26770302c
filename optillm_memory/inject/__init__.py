"""Injection: hits rendered as turns or as a block, and placed so that the prompt's prefix is unchanged."""
