# Makes the workspace a repository of the site's own where it is in none, so that the tools and habits of agents work:
# with a .gitignore where there is none, and without a commit.
#
# Usage:  sh -c "$(cat adopt.sh)" sh
#   GIT_WORK_TREE in the environment: the workspace
# Input:  none.
# Output: none.
# Exit:   0; 69 without git.
command -v git >/dev/null || exit 69
cd "$GIT_WORK_TREE" || exit 1
unset GIT_DIR GIT_WORK_TREE
set -C
[ -e .gitignore ] || [ -L .gitignore ] || printf '%s\n' '# made by incus-gateway; change it as you like' \
  node_modules/ .venv/ __pycache__/ .next/ .nuxt/ .svelte-kit/ .astro/ .cache/ dist/ '*.log' .env '.env.*' >.gitignore
[ -e .git ] || [ -L .git ] || git init -q --template= -b main
