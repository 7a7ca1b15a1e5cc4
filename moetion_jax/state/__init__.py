"""What a training state is: its operators, digests, optimizers, layout."""
