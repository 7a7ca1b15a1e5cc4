"""Files in host memory (tmpfs) that the processes of a host share."""
