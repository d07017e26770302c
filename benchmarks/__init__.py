"""Research: measurements of the project itself, compared with others and under faults; not part of the wheel.

`python -m benchmarks NAME`, from a checkout.
"""
