"""A stranger's package, for tests only."""
