"""The language-model job, shared by all commands."""
