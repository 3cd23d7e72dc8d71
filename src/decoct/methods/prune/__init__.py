"""Pruning: one file a method."""
