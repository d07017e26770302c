"""The request: messages become a task, steps, prefixes and a frame; options and feedback are validated."""
