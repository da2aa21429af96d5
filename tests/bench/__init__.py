"""`make bench`: pmgsync beside PostgreSQL's own logical replication, on the same servers, the same work, in turns."""
