"""What a person does, in a real browser, through real Caddy, on a real tenant."""
