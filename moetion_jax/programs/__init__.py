"""A stage as compiled programs over the mesh of its devices."""
