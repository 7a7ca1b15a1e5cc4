"""The coordinator: events in, actions out."""
