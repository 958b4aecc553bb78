# Makes the workspace a repository of the site's own where it is in none, so that the tools and habits of agents work:
# with a .gitignore where there is none, and what is there as its first commit unless that takes long.
#
# Usage:  sh -c "$(cat adopt.sh)" sh
#   GIT_WORK_TREE in the environment: the workspace
# Input:  none.
# Output: where it made a .gitignore, when, in seconds since the epoch.
# Exit:   0; 69 without git.
command -v git >/dev/null || exit 69
cd "$GIT_WORK_TREE" || exit 1
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
set -C
[ -e .gitignore ] || [ -L .gitignore ] || {
  printf '%s\n' '# made by incus-gateway; change it as you like' node_modules/ .venv/ __pycache__/ \
    .next/ .nuxt/ .svelte-kit/ .astro/ .cache/ dist/ '*.log' .env '.env.*' >.gitignore && stat -c %.9Z .gitignore
}
if ! [ -e .git ] && ! [ -L .git ]; then
  git init -q --template= -b main || exit
  mkdir -p .git/info && printf '%s\n' node_modules/ .venv/ __pycache__/ >.git/info/exclude
  unset GIT_AUTHOR_DATE GIT_COMMITTER_DATE
  export GIT_AUTHOR_NAME=site GIT_COMMITTER_NAME=site GIT_AUTHOR_EMAIL=site@localhost GIT_COMMITTER_EMAIL=site@localhost
  { timeout 10 git add --all && git commit -q -m 'First deployment'; } \
    >/dev/null 2>&1 </dev/null || rm -f .git/index .git/index.lock
fi
