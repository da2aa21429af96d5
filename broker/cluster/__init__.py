"""Who is in the cluster: keys, document, and the door that newcomers come through."""
