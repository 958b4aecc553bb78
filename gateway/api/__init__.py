"""What clients can reach: HTTP routes, websockets, MCP, the editor's page."""
