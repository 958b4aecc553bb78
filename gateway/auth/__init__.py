"""Who may do what: tokens, what is open under each, and which were revoked."""
