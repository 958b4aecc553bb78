"""Tokens: what each one allows, what is open under it, and which are revoked."""
