"""Everything that a client reaches: HTTP routes, websockets, MCP, the editor's page."""
