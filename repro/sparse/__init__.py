"""What sparsity buys: bytes (`repro.sparse.storage`, needs no torch) and time (`repro.sparse.timing`)."""
