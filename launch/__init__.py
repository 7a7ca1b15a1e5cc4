"""The programs: flags, processes, data, files; flags are defined only here."""
