"""Boundary logs: what stages publish for each other, on one host or several."""
