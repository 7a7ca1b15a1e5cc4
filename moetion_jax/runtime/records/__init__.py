"""What a run leaves behind in its workdir."""
