"""The processes and the stores of a run on all its hosts, as its agent has them."""
