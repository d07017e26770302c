"""Where it lives: the log, what is derived from it, and the only SQL.

- A `Store` (`base.py`) reads and a `Transaction` (`transaction.py`) writes; both are composed of the tables in
  `tables/`, a module for each family with its write half and its read half.
- What a trace or feedback teaches is written in `fold.py`.
- Rows of the log are deleted in `maintenance/forget.py`, and nowhere else.
- What differs between databases is in `backend.py`. Another vector store is another `VectorSearch`: see
  `postgres/search.py`. Another database brings a `Dialect` and a `Location`, too.
"""
