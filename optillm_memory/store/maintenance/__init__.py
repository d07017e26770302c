"""Looking after a store: verify, back up, copy, forget, retain."""
