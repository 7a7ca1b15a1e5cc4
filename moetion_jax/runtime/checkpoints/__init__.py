"""The final checkpoint of a run: a plain Orbax one, with its proof."""
