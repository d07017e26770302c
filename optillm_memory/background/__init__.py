"""Every thread that memory starts, and the order in which they are closed."""
