"""The tables, a module for each family: what is written to it, and what is read of it."""
