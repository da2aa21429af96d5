"""The command line `pmgcm`: one file a command; a client of the local broker and database that holds no state."""
