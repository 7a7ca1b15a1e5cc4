"""Compiled programs of a stage, over the mesh of its devices."""
