"""Who leads: what this node has promised and voted, and what it does when it is the master or is to become it."""
