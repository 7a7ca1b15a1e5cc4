"""What is captured when: pure rules, and planners that remember measurements."""
