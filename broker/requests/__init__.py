"""Requests of this machine's processes, on the unix socket, and of other members, on the control port."""
