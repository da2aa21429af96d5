"""Snapshots, taken and put in place."""
