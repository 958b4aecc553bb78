"""Claude Code's tools: their semantics and their texts.

`toolbox` is how the rest of the gateway calls them, `session` what the calls of one agent share, `schemas`
their names, inputs and descriptions, and `shell` the texts of Bash. The other modules run inside workers (see
`gateway.rootfs`), which import only what they need; `worker_operations` is their table.
"""
