# Keeps the history small: packs it, and lets go of the oldest turns where there are too many, or they take too much room.
#
# Usage:  sh -c "$(cat writing.sh tidy.sh)" sh KEPT BYTES WAIT
#   KEPT   turns that are kept at most
#   BYTES  that the history may take; beyond, half of the turns go
#   WAIT   seconds to wait for another that writes this history
#   GIT_DIR in the environment: the history
# Input:  none.
# Output: none.
# Exit:   0; 69 without git, 75 where another still writes.
command -v git >/dev/null || exit 69
[ -e "$GIT_DIR/HEAD" ] || exit 0
writing "$3"
kept="$1"
taken() { du -sk "$GIT_DIR" 2>/dev/null | cut -f1; }
# a pack has what loose objects take many times over
if [ "$(find "$GIT_DIR/objects" -type f | head -1000 | wc -l)" -ge 1000 ]; then
  git gc -q --prune=now
fi
count=$(git rev-list --count turns) || exit 0
if [ "$(taken)" -gt $(($2 / 1024)) ] && [ "$count" -gt 1 ]; then
  half=$((count / 2))
  [ "$half" -ge "$kept" ] || kept="$half"
fi
[ "$count" -gt "$kept" ] || exit 0
git rev-list -n 1 --skip=$((kept - 1)) turns >"$GIT_DIR/shallow.new" && mv "$GIT_DIR/shallow.new" "$GIT_DIR/shallow"
git gc -q --prune=now
