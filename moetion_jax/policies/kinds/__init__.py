"""One module a policy: its rules and its planner."""
