# shellcheck shell=bash
# Sourced by deploy/quickstart and tests/run: what must be there before any Python of ours can run.
# Defines functions only. Works with bash 3.2, so that a laptop's own bash can say why it will not do.

step_started=0
step() { # NAME: begins a step
  step_name=$1
  step_started=$SECONDS
}

done_step() { # WHAT: ends it
  printf '==> %s: %s (%d s)\n' "$step_name" "$1" "$((SECONDS - step_started))"
}

die() { # MESSAGE: ends the script with what to do
  printf 'failed: %s: %s\n' "${step_name:-start}" "$1" >&2
  exit 1
}

# Steps that need nothing of one another run beside one another. What one says is shown when it is waited for, so
# that no two mix. Those that were not waited for end with the script, all that they started included; the log of one
# that may outlive it (after `exec`) is given.
begin() { # NAME LOG COMMAND…: begins a command, and says so; LOG may be empty
  local name=$1 log=$2
  shift 2
  [ -n "$log" ] || log=$(mktemp) || die 'there is no room for a file in the folder of temporary files'
  { : >>"$log" && chmod 600 "$log"; } || die "cannot write $log"
  trap end_begun EXIT
  set -m # a process group of its own
  "$@" >"$log" 2>&1 </dev/null 9>&- &
  set +m
  eval "begun_$name=$! log_$name=\$log"
  begun="${begun:-} $name"
  printf '%s: goes on beside what follows\n' "$name"
}

finish() { # NAME: waits for it, shows what it said, and returns its exit code
  local pid="begun_$1" log="log_$1" status
  wait "${!pid}"
  status=$?
  begun=${begun/ $1/}
  if [ "$status" = 0 ]; then cat "${!log}"; else cat "${!log}" >&2; fi
  rm -f "${!log}"
  return "$status"
}

end_begun() {
  local name pid log
  for name in ${begun:-}; do
    pid=begun_$name log=log_$name
    kill -- "-${!pid}" 2>/dev/null
    rm -f "${!log}"
  done
}

# A private log of noisy commands, shown only where they fail.
quietly() { # COMMAND…
  local log
  log=$(mktemp) || return 1
  if "$@" >"$log" 2>&1 </dev/null; then
    rm -f "$log"
    return 0
  fi
  tail -n 15 "$log" | sed 's/^/    /' >&2
  rm -f "$log"
  return 1
}

# Runs a package manager; while another one has the lock it says so and waits, five minutes at most. With the
# option alone apt would wait without a word, and dpkg not at all.
lock_timeout=300
lock_held='locked by .*process\|Could not get lock\|is another process using it'
unlocked() { # COMMAND…
  local log status began=$SECONDS told=
  log=$(mktemp) || return 1
  while :; do
    LC_ALL=C "$@" >"$log" 2>&1 </dev/null
    status=$?
    # shellcheck disable=SC2015 # either of the two ends it
    [ "$status" != 0 ] && grep -q "$lock_held" "$log" || break
    if [ "$((SECONDS - began))" -ge "$lock_timeout" ]; then
      tail -n 2 "$log" | sed 's/^/    /' >&2
      rm -f "$log"
      die "another program has been installing packages for $((lock_timeout / 60)) minutes; let it end, then run this again"
    fi
    [ -n "$told" ] || printf 'waiting for another program that installs packages: %s\n' \
      "$(grep "$lock_held" "$log" | head -n 1)"
    told=1
    sleep 2
  done
  [ "$status" = 0 ] || tail -n 15 "$log" | sed 's/^/    /' >&2
  rm -f "$log"
  return "$status"
}

apt() { # ARGUMENTS…: apt-get that asks nothing
  DEBIAN_FRONTEND=noninteractive unlocked apt-get -q -y -o DPkg::Lock::Timeout=2 "$@"
}

missing_packages() { # PACKAGE…: prints those that are not installed
  local package
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s\n' "$package"
  done
}

install_packages() { # PACKAGE…
  # An interrupted dpkg refuses everything until this is done; it is quick where there is nothing to do.
  unlocked dpkg --configure -a || die "dpkg is in a broken state; repair it with: apt-get -f install"
  # A fresh machine has no lists yet.
  if compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
    apt install --no-install-recommends "$@" && return 0
    printf 'the package lists may be older than the mirror; fetching them and trying again\n'
  fi
  apt update || die "apt-get update fails: check the network and /etc/apt, then run this again"
  apt install --no-install-recommends "$@" ||
    die "these packages cannot be installed: $*; see the lines above (Incus needs Debian 13 or Ubuntu 24.04)"
}

host_packages() { # CHECKOUT: prints every package that the host needs
  grep -v -e '^#' -e ' ' "$1/deploy/packages"
  # Gives tenants their own view of memory and CPUs; where systemd does not run, nothing would start it.
  [ -d /run/systemd/system ] && printf 'lxcfs\n'
  return 0
}

image_packages() { # prints what builds the tenants' image, of the packages of the host
  printf '%s\n' mmdebstrap squashfs-tools debian-archive-keyring ca-certificates
}

part_packages() { # CHECKOUT PART: prints the packages that this part of the tests needs beside them
  sed -n "/^#/d; s/ $2\$//p" "$1/deploy/packages"
}

good_python() { # PYTHON: at least 3.11, and able to make an environment with pip in it
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() { # prints the path of a good Python
  local candidate path
  # The system's own first: it stays when a version manager's is removed.
  for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    if good_python "$path"; then
      printf '%s\n' "$path"
      return 0
    fi
  done
  return 1
}

ensure_python() { # sets $python
  python=$(find_python) && return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    install_packages python3 python3-venv
    python=$(find_python) && return 0
  fi
  die "no Python 3.11 or newer with venv was found; install one (Debian, Ubuntu: apt-get install python3-venv)"
}

ensure_uv() { # sets $uv; where there is none it is fetched for this run alone
  local place
  uv=$(command -v uv 2>/dev/null) && return 0
  [ -n "${python:-}" ] || ensure_python
  place=$(mktemp -d)
  # shellcheck disable=SC2064 # this folder
  trap "rm -rf '$place'" EXIT
  { "$python" -m venv "$place" && "$place/bin/pip" install --quiet --disable-pip-version-check uv; } ||
    die "uv cannot be installed; check that this machine reaches the package index"
  # shellcheck disable=SC2034 # for the script that sources this
  uv=$place/bin/uv
}

good_node() { # what Vite and the web tests need: Node 20.19 or newer, and npm
  command -v npm >/dev/null 2>&1 && node -e '
    const [major, minor] = process.versions.node.split(".").map(Number);
    process.exit(major > 20 || (major === 20 && minor >= 19) ? 0 : 1)' >/dev/null 2>&1
}

# The web's packages as package-lock.json says; returns 1 where they are there already.
ensure_node_modules() { # FOLDER
  local folder=$1 stamp
  stamp="$(digest <"$folder/package-lock.json") $(node --version)"
  [ "$(cat "$folder/node_modules/.stamp" 2>/dev/null)" = "$stamp" ] && return 1
  quietly npm ci --prefix "$folder" --ignore-scripts --no-audit --no-fund ||
    die "npm cannot install the web's packages; check that this machine reaches the npm registry, then run this again"
  printf '%s\n' "$stamp" >"$folder/node_modules/.stamp"
}

digest() { # reads stdin, prints one word
  cksum | tr -s ' \t' '-'
}

checkout_digest() { # CHECKOUT: changes whenever what pip would install does
  (cd "$1" && find pyproject.toml deploy/requirements.txt README.md LICENSE gateway clients/python caddy deploy/templates -type f \
    ! -path '*/__pycache__/*' ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 cksum | digest)
}

# An environment with the project in it, and what a lockfile names, each file by its hash (deploy/lock makes it).
# Nothing is built but the project, by what is locked too. The stamps are written last: without them, what is there
# is not trusted.
ensure_venv() { # VENV STAMP LOCKFILE PIP-ARGUMENTS…
  local venv=$1 stamp=$2 lock=$3 pip
  shift 3
  [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null && return 1
  rm -f "$venv/.stamp"
  ensure_empty_venv "$venv"
  ensure_venv_packages "$venv" "$lock"
  installer "$venv"
  quietly "${pip[@]}" --no-deps --no-build-isolation "$@" || die 'pip cannot install the project'
  printf '%s\n' "$stamp" >"$venv/.stamp"
}

# Each version has an environment of its own, and the link `venv` says which one is in use: what runs keeps its files
# while the next one is installed, and the one before stays, to go back to (gateway/host/gateway_process.py).
environment_in_use() { # STATE: prints its path, nothing where there is none
  # without -P it would be the link's own
  [ -x "$1/venv/bin/python" ] && (cd -P "$1/venv" && pwd -P)
}

installed_environment() { # STATE STAMP: prints the environment in which that is installed, the one in use first
  local link folder
  for link in venv venv.previous; do
    folder=$(cd -P "$1/$link" 2>/dev/null && pwd -P) || continue
    [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$2" ] || continue
    "$folder/bin/python" -c '' 2>/dev/null || continue
    printf '%s\n' "$folder"
    return
  done
}

next_environment() { # STATE: prints the folder of another one: what a run that failed has left, or a new one
  local state folder number=1
  state=$(cd -P "$1" && pwd -P)
  for folder in "$state"/venvs/*; do
    [ -d "$folder" ] || continue
    [ "${folder##*/}" -lt "$number" ] || number=$((${folder##*/} + 1))
    [ "$folder" != "$(cd -P "$state/venv" 2>/dev/null && pwd -P)" ] || continue
    [ "$folder" != "$(cd -P "$state/venv.previous" 2>/dev/null && pwd -P)" ] || continue
    ! grep -q -s -F "$folder/" /proc/[0-9]*/cmdline || continue # a gateway that ends, or that quickstart left
    printf '%s\n' "$folder"
    return
  done
  printf '%s/venvs/%s\n' "$state" "$number"
}

# What is the same in both need not be fetched again.
copy_packages() { # FROM TO LOCKFILE
  local from=$1 to=$2 stamp packages
  stamp="$(digest <"$3") $("$to/bin/python" -V 2>&1)"
  [ "$(cat "$from/.packages" 2>/dev/null)" = "$stamp" ] && [ ! -f "$to/.packages" ] || return 0
  packages=$("$to/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return 0
  rm -rf "$packages"
  if cp -a "$from/${packages#"$to/"}" "$packages"; then
    printf '%s\n' "$stamp" >"$to/.packages"
  else
    rm -rf "$to"
    ensure_empty_venv "$to"
  fi
}

ensure_empty_venv() { # VENV: one with pip in it, at least
  local venv=$1
  "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && return
  rm -rf "$venv"
  mkdir -p "$(dirname "$venv")"
  quietly "$python" -m venv "$venv" || die "cannot make a Python environment in $venv with $python"
}

installer() { # VENV: sets $pip
  pip=("$1/bin/python" -m pip install --disable-pip-version-check)
}

# Most of an installation is waiting for answers: parts at the same time take half as long. The file has all that is
# needed. By xargs, since a shell would have its background jobs ignore interrupts.
in_parts() { # installs what the files in $parts name with $pip
  printf '%s\0' "$parts"/* | xargs -0 -n 1 -P 3 "${pip[@]}" --quiet --no-deps --require-hashes --only-binary :all: -r
}

ensure_venv_packages() { # VENV LOCKFILE
  local venv=$1 lock=$2 stamp pip parts failed=''
  stamp="$(digest <"$lock") $("$venv/bin/python" -V 2>&1)"
  [ "$(cat "$venv/.packages" 2>/dev/null)" = "$stamp" ] && return
  rm -f "$venv/.packages" "$venv/.stamp"
  installer "$venv"
  parts=$(mktemp -d)
  awk -v parts="$parts" '/^[A-Za-z0-9]/ { part = parts "/" number++ % 3 } part { print >part }' "$lock"
  quietly in_parts || failed=yes
  rm -rf "$parts"
  [ -z "$failed" ] ||
    die "pip cannot install what $lock names; check that this machine reaches a Python package index, then run this again"
  printf '%s\n' "$stamp" >"$venv/.packages"
}

# The manual page and the completion of the shells, where each looks by itself; says which are there.
install_texts() { # COMMAND SHARE FISH: the folder of a share, such as /usr/local/share, and fish's own
  local command=$1 share=$2 fish=$3 shell target written=''
  for shell in bash zsh fish man; do
    case "$shell" in
      bash) target=$share/bash-completion/completions/incus-gateway ;;
      zsh) target=$share/zsh/site-functions/_incus-gateway ;;
      fish) target=$fish/incus-gateway.fish ;;
      man) target=$share/man/man1/incus-gateway.1 ;;
    esac
    # shellcheck disable=SC2046 # words
    if mkdir -p "${target%/*}" 2>/dev/null && "$command" $([ "$shell" = man ] || echo completion) "$shell" \
      >"$target.new" 2>/dev/null && chmod 0644 "$target.new" && mv "$target.new" "$target"; then
      written="$written, $shell"
    else
      rm -f "$target.new" 2>/dev/null
    fi
  done
  printf '%s\n' "${written#, }"
}
