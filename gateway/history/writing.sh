# Stands before each script that writes a history: defines how that begins, and what a history's own files say.
#
# Usage:  sh -c "$(cat writing.sh commit.sh)" sh …
#   GIT_DIR in the environment: the history
# Input:  none.
# Output: none.
# Exit:   75 by `writing` where another still writes.

# Takes the history's lock within WAIT seconds. Where the last one that had it was killed or failed, what is in the way
# of git is mended first: locks, and pipes or links in the place of files, at which it would wait for ever.
writing() { # WAIT
  if [ -e "$GIT_DIR.lock" ] && [ ! -f "$GIT_DIR.lock" ]; then rm -rf "$GIT_DIR.lock"; fi
  exec 9>>"$GIT_DIR.lock"
  flock -w "$1" 9 || exit 75
  begun="$GIT_DIR/turn.begun"
  if [ -d "$GIT_DIR" ] && [ ! -L "$GIT_DIR" ]; then
    if [ -e "$begun" ] || [ -L "$begun" ]; then mend || exit 1; else : >"$begun"; fi
  elif [ -e "$GIT_DIR" ] || [ -L "$GIT_DIR" ]; then
    rm -rf "$GIT_DIR"
  fi
  if [ -f "$GIT_DIR/turn.going" ]; then finish; fi
  # what ended with a word of ours has left nothing half done
  trap 'case $? in 0 | 6? | 75) rm -f "$begun" ;; esac' EXIT
}

# Removes what is in the way of git, and the index, which may have what no turn has; writes anew what is ours.
mend() {
  rm -rf "$GIT_DIR/index"
  find "$GIT_DIR/" '(' -name '*.lock' -o ! -type d ! -type f -o -path '*/objects/info/*' ')' -exec rm -rf {} +
  rm -rf "$GIT_DIR/commondir" "$GIT_DIR/turn.begun"
  : >"$GIT_DIR/turn.begun" # whoever mends may be killed, too
  configure
}

# Moves the workspace to a commit that follows the last one: whole or not at all. All files are compared with what is
# recorded before the first is written; what a kill leaves half done, whoever writes next carries through.
go() { # COMMIT
  git update-index -q --refresh >/dev/null || : # a file that was saved unchanged is as it was recorded
  git diff-tree -r -z --no-renames --name-only --diff-filter=A turns "$1" >"$GIT_DIR/turn.added" || return 1
  above "$GIT_DIR/turn.added" >"$GIT_DIR/turn.above"
  # shellcheck disable=SC2185 # the names are in a file
  find -files0-from "$GIT_DIR/turn.above" -maxdepth 0 ! -type d -print0 2>/dev/null >>"$GIT_DIR/turn.added"
  # git would overwrite what is ignored
  lost=$(xargs -0 -r git --literal-pathspecs ls-files -z -o -- <"$GIT_DIR/turn.added" | head -z -n 1 | tr '\0' ' ')
  [ -z "$lost" ] || { echo "no turn has $lost" >&2 && return 65; }
  git read-tree -n -m -u turns "$1" || return 65
  echo "$1" >"$GIT_DIR/turn.going"
  if ! git read-tree -m -u turns "$1"; then
    # changed just now, or a folder where the site's user may not write
    rm -f "$GIT_DIR/turn.going"
    carry "$1" turns
    rm -f "$GIT_DIR/index"
    return 65
  fi
  git update-ref refs/heads/turns "$1" && rm -f "$GIT_DIR/turn.going" || return 1
}

# Carries through what was begun by `go`.
finish() {
  turn=$(head -c 40 "$GIT_DIR/turn.going" | tr -cd 0-9a-f)
  if [ -n "$turn" ] && [ "$(git rev-parse -q --verify "$turn^" 2>/dev/null)" = "$(git rev-parse -q --verify refs/heads/turns)" ]; then
    carry turns "$turn"
    git update-ref refs/heads/turns "$turn"
  fi
  rm -f "$GIT_DIR/turn.going" "$GIT_DIR/index"
}

# Makes the files that are as in one commit as they are in another, and leaves those that are not.
carry() { # FROM TO
  differ="$GIT_DIR/turn.differ" other="$GIT_DIR/turn.other"
  rm -f "$GIT_DIR/index" "$GIT_DIR/index.lock"
  git read-tree "$1" || return 1
  git update-index -q --refresh >/dev/null || :
  git diff-tree -r -z --no-renames --name-only "$1" "$2" | sort -zu >"$differ"
  {
    git diff-files -z --name-only
    # shellcheck disable=SC2185 # the names are in a file
    git diff-tree -r -z --no-renames --name-only --diff-filter=A "$1" "$2" |
      find -files0-from - -maxdepth 0 -print0 2>/dev/null
  } | sort -zu | comm -z -23 "$differ" - >"$other"
  xargs -0 -r git --literal-pathspecs ls-tree --full-tree -r -z "$2" -- <"$other" >"$differ"
  rm -f "$GIT_DIR/turn.index"
  tree=$(
    export GIT_INDEX_FILE="$GIT_DIR/turn.index"
    git read-tree "$1"
    { xargs -0 -r printf '0 0000000000000000000000000000000000000000\t%s\0' <"$other" && cat "$differ"; } |
      git update-index -z --index-info && git write-tree
  ) && git read-tree -m -u "$1" "$tree"
}

# Prints the folders around paths.
above() { # LIST
  sed -z -n ':a;s|/[^/]*$||;T;p;ba' "$1" | sort -zu
}

# Makes the index from the last turn where it was removed.
indexed() {
  [ ! -e "$GIT_DIR/index" ] && git rev-parse -q --verify refs/heads/turns >/dev/null || return 0
  git read-tree turns || return 1
  git update-index -q --refresh || : # some have changed since
}

# Writes what git reads of a history beside its commits. All is recorded as the files are, byte for byte, whatever the
# workspace's own .gitattributes say.
configure() {
  rm -rf "$GIT_DIR/config" "$GIT_DIR/HEAD" "$GIT_DIR/info" && mkdir -p "$GIT_DIR/info" || return 1
  printf '[core]\n\trepositoryformatversion = 0\n\tbare = false\n' >"$GIT_DIR/config" &&
    echo 'ref: refs/heads/turns' >"$GIT_DIR/HEAD" &&
    printf '%s\n' '* !text !eol !crlf !ident !filter !working-tree-encoding !diff' >"$GIT_DIR/info/attributes" &&
    printf '%s\n' /.gateway/ '.gateway-*' node_modules/ __pycache__/ .venv/ .next/ .nuxt/ .svelte-kit/ .astro/ \
      .cache/ '*.db' '*.db-*' '*.sqlite*' '*.log' >"$GIT_DIR/info/exclude"
}
