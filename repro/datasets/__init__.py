"""Corpora: fetching and checking them, speech recorded and made, features, batches. Only `batches` needs torch."""
