"""Changes tenants on request, and puts unused ones to sleep."""
