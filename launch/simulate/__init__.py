"""A discrete-event simulation of training under failures."""
