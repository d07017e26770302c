"""The demo: a small model with a real optillm, taught by feedback and asked again after a restart."""
