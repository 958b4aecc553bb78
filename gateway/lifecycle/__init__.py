"""A tenant's lifecycle as clients ask for it, and sleep while nobody does."""
