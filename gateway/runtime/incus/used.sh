# Prints the bytes on the disk of a container, its image's among them; other file systems count for nothing.
exec du --summarize --one-file-system --block-size=1 /
