"""Low-rank factorization: one file a method."""
