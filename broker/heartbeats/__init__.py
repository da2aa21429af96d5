"""What a node says of itself every second, and what is read off it: lag, clock skew, conflicts."""
