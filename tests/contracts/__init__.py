"""What holds for every runtime: the same tests over `local` (unit) and `incus` (integration)."""
