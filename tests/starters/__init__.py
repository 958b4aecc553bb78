"""Starters of frameworks, made by their own generators, deployed without a manifest and worked on."""
