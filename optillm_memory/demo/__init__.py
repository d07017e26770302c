"""The demo: a small model behind a real optillm, taught and asked again."""
