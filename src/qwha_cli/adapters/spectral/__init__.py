"""The spectral adapter (QWHA): a sparse matrix in the Walsh-Hadamard domain added to one linear layer."""
