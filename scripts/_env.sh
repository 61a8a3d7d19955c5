# Sourced by the other scripts: goes to the project's root and sees that .venv holds what pyproject.toml and
# constraints.txt ask for. Needs Python 3.11+ with venv and pip, nothing else; does nothing when all is in place.
# Your pip's own configuration (index, proxy, certificates) is respected. VEILTUNE_PYTHON names another interpreter.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
VENV="$ROOT/.venv"
BIN="$VENV/bin"

say() { printf '%s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${VEILTUNE_PYTHON:+"$VEILTUNE_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  say "error: no Python 3.11 or newer with the venv module was found"
  say "hint: install one (Debian and Ubuntu keep venv in a package of its own), or name it: VEILTUNE_PYTHON=/path/to/python"
  return 1
}

# What the environment was made from: the two files and the place, since scripts in .venv/bin name it.
wanted_stamp() {
  "$BIN/python" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([*parts, str(root).encode(), sys.version.encode()])).hexdigest())
PY
}

pip_install() { # what is said, then pip's arguments
  local log="$VENV/install.log"
  say "  $1 …"
  shift
  if ! "$BIN/python" -m pip install --no-input "$@" >>"$log" 2>&1; then
    tail -n 25 "$log" >&2
    say "error: pip install $* failed; the whole log is .venv/install.log"
    say "hint: check the network and pip's index (pip config list), then run the script again"
    return 1
  fi
}

ensure_env() {
  local stamp="$VENV/.veiltune-stamp" wanted python torch
  # A .venv that does not start, or was moved here from elsewhere, is made anew: its scripts name the old place.
  if ! "$BIN/python" -c "" >/dev/null 2>&1 || ! grep -qsF "$BIN" "$BIN/pip"; then
    python="$(find_python)" || return 1
    say "Making .venv with $("$python" --version 2>&1): once, a few minutes and 2 GB"
    "$python" -m venv --clear "$VENV" || return 1
  fi
  wanted="$(wanted_stamp)" || return 1
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return 0; fi
  : >"$VENV/install.log"
  torch="$(grep '^torch==' constraints.txt)" || return 1
  # Torch first and alone: the build that the configured index offers for this machine is kept by what follows.
  pip_install "installing $torch" "$torch" || return 1
  pip_install "installing veiltune and its tools" -c constraints.txt -e '.[dev]' || return 1
  printf '%s\n' "$wanted" >"$stamp"
}

ensure_env || exit 1
# An idle party's spinning threads slow the busy one when they share cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
