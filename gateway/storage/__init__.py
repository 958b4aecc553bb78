"""The gateway's own records: the state dir, its SQLite file, and the notes that are not in the file yet.

From outside use `store.Store`, its `StoreFailed`, and `state_dir`.
"""
