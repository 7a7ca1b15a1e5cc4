"""The worker's loop: the iterations of one stage."""
