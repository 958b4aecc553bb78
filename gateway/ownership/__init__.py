"""Whose each name and each domain is."""
