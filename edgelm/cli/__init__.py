"""The command line: one file a verb, each imported only when its verb is used."""
