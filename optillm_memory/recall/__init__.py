"""What is like it: encoder, vector index and ranking."""
