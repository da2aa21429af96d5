"""The state of this node and its cluster, for status and for the heartbeat."""
