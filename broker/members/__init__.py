"""The connections to the other members, and the calls that pass through them."""
