# Sourced by the shell scripts: finds or installs uv, installs the project into .venv, takes a settings file.
# Needs Python 3.10-3.12 with pip; nothing else.

fail() {
  echo "error: $*" >&2
  exit 2
}

# Sets the array UV to the command that runs uv, installing it with pip when it is missing.
find_uv() {
  if command -v uv >/dev/null 2>&1; then
    UV=(uv)
    return
  fi
  local python
  python=$(command -v python3 || command -v python) || fail "Python 3 is not installed; install Python 3.10-3.12 with pip"
  if ! "$python" -m uv --version >/dev/null 2>&1; then
    echo "installing uv with pip …"
    if ! "$python" -m pip install --quiet uv 2>/dev/null; then
      # A Python that its distribution manages refuses pip; a virtual environment of its own does not.
      "$python" -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv ||
        fail "uv could not be installed with pip; install it by hand (pip install uv) and run this again"
      python=.venv-uv/bin/python
    fi
  fi
  UV=("$python" -m uv)
}

# install_project [uv sync options]: installs the pinned packages into .venv (about 6 GB with CUDA on Linux) and leaves
# what else stands there (flash-attn, say).
install_project() {
  find_uv
  echo "installing packages into .venv …"
  "${UV[@]}" sync --quiet --inexact "$@" || fail "the packages could not be installed; the lines above say why (network? disk space?)"
}

# extras_for_settings: the uv sync options for what the settings file or the environment asks for beyond the usual.
extras_for_settings() {
  local value=' *= *["'\'']?' given
  given=$(env; cat "${ENV_FILE:-.env}" 2>/dev/null || true)
  if grep -qE "^ *(export +)?(OPTIMIZER${value}adamw_8bit|WEIGHTS_PRECISION${value}bf16|MEMORY_PROFILE${value}[a-z0-9])" <<<"$given"; then
    echo "--extra 8bit"
  fi
  if grep -qE "^ *(export +)?MOS_MODEL${value}(distillmos|dnsmos|utmos)" <<<"$given"; then
    echo "--extra mos"
  fi
}

# take_env_file CALLED_FROM [arguments]: exports ENV_FILE when the first argument is a settings file, looked up where the
# user stands, then in the project. Sets TAKEN to the number of arguments that it used.
take_env_file() {
  local called_from=$1 file=${2:-}
  TAKEN=0
  [[ -n $file && $file != -* ]] || return 0
  if [[ -f "$called_from/$file" ]]; then
    ENV_FILE=$called_from/$file
  elif [[ -f $file ]]; then
    ENV_FILE=$file
  else
    fail "settings file $file does not exist (looked in $called_from and $PWD)"
  fi
  export ENV_FILE
  TAKEN=1
}
