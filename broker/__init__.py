"""The broker: the network and the journal. It knows nothing of PostgreSQL."""
