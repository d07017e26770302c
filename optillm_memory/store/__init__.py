"""Where it lives: the only room with SQL."""
