"""What a stopped run left in host memory, read without its agent."""
