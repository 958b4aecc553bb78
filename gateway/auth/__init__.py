"""Tokens: what each allows, what is open under it, and which were revoked."""
