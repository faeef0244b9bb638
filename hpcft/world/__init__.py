"""The recoverable world: who is in it, and how it heals. Knows no torch."""
