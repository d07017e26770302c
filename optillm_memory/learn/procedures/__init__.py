"""Procedures: what the steps of solved episodes have in common, with slots where a value varied."""
