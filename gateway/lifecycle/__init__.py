"""Changes tenants as clients ask, and puts unused ones to sleep."""
