"""How this node and its cluster are, for status and for the heartbeat."""
