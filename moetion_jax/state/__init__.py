"""Training state: its operators, digests, optimizers and layout."""
