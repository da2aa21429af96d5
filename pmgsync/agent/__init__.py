"""The agent: worker processes between the local PostgreSQL and the local broker."""
