"""What lies in host memory (tmpfs), shared by the processes of a host."""
