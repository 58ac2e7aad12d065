"""What this machine is, what it can measure, and what is missing on it."""
