"""Nearest-neighbour search among the vectors of a scope.

`quantization` stores vectors in bytes; `flat` compares a query with every row; `pca` and `kmeans` are what the inverted
file is trained by, `ivf` searches it (`ivf_format`: how it lies on disk, `ivf_calibration`: how much a search has to
look at, `ivf_writer`: how it is made). `scope_index` joins a file with the rows that changed since, and `cache` keeps
the indexes of recently used scopes up to date.
"""
