"""Reading a node's WAL through its slot."""
