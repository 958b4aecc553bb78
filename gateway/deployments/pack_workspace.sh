# Prints what a site is made of as a tar: of a repository what .gitignore does not leave out, else all files. What is
# made again by an install, and the repository itself, stays behind in any case.
#
# Usage:  sh -c "$(cat pack_workspace.sh)" sh WORKSPACE MOST
#   WORKSPACE  its folder
#   MOST       bytes that are printed; what is longer is cut off there, and by that known to be too large
# Input:  none.
# Output: the tar.
# Exit:   0; 1 where it cannot be read.
workspace="$1" most="$2"
cd "$workspace" || exit 1
names() {
  # what is deleted and still on record is no file
  if command -v git >/dev/null && git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    # shellcheck disable=SC2016 # the inner shell expands it
    git -c core.fsmonitor=false ls-files -z --cached --others --exclude-standard --deduplicate |
      xargs -0 -r sh -c 'for name; do if [ -e "$name" ] || [ -L "$name" ]; then printf "%s\0" "$name"; fi; done' sh
  else
    find . -name node_modules -prune -o -name .git -prune -o '(' -type f -o -type l ')' -print0
  fi
}
names | tar --create --null --no-recursion --exclude=node_modules --exclude=.git --files-from=- --file=- | head -c "$most"
