"""Reads what a stopped run left in host memory, without its agent."""
