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
