"""Policies of capture: pure rules, and planners that remember measurements."""
