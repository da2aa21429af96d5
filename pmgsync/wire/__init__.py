"""How processes talk: control messages and sessions with a broker."""
