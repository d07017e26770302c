"""The tables, one family a module: what is read of it and what is written to it."""
