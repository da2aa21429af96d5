"""Everything that touches the file system for the trees; nothing here knows a network or a database."""
