"""What is known of each node, and how it is shown."""
