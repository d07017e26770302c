"""A recording upstream, a real host as a child process and small models: for our tests and our users' tests."""
