"""The gateway's own records: the state dir, its SQLite file, and the notes that are ahead of that."""
