"""The gateway's own records: the state dir, its SQLite file, and notes that are not in the file yet.

Other packages use `store.Store`, `StoreFailed`, and `state_dir`.
"""
