"""Programs: flags, processes, data, files. The only place that has flags."""
