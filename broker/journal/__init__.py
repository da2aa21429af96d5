"""The frames of every chain that this node holds, in memory until they are on disk."""
