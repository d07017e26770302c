"""Benches: seeded measurements of the real code paths."""
