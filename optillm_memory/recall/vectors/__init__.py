"""Vectors: quantized, searched exactly or through an inverted file, kept up to date by scope."""
