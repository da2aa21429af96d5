"""The chains of a cluster: publishing the own one, following the others, streaming all of them."""
