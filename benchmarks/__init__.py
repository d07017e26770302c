"""Research: measurements of the project itself, beside others, and under faults; not in the wheel."""
