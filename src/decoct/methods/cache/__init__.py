"""Policies of the key-value cache."""
