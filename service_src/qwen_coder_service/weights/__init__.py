"""Weights on a host: fetched, checked against a manifest of SHA-256 sums, and put in place whole or not at all."""
