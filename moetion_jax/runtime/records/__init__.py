"""The files that a run leaves behind in its workdir."""
