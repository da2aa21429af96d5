"""`pmgcm demo`: a whole cluster on this machine, real servers and services, with mail traffic on every node."""
