"""Requests from this machine's processes and from other members."""
