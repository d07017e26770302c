"""How to say it: hits rendered as turns or as a block, and placed so that a prompt's prefix stays as it was."""
