"""What the toolkit costs, and what it is worth."""
