"""What came in: messages become a task, steps, prefixes and a frame; options and feedback are checked."""
