# Sourced by the scripts that train: starts a Python script as one process or as several. The variables:
#
#   NUM_PROCESSES        processes on this machine, one for each GPU
#   ACCELERATE_CONFIG    a configuration file of Accelerate; configs/ has one for each way
#   NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT     several machines: see configs/several_machines.yaml
NUM_PROCESSES=${NUM_PROCESSES:-1}
NUM_MACHINES=${NUM_MACHINES:-1}
MACHINE_RANK=${MACHINE_RANK:-0}

# start PYTHON SCRIPT [arguments]: takes this shell's place, so that signals reach it and its exit code is the script's.
start() {
  local python=$1 name
  shift
  for name in NUM_PROCESSES NUM_MACHINES; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name: \"${!name}\" is not a whole number of at least 1"
  done
  if ((NUM_PROCESSES * NUM_MACHINES == 1)); then
    exec "$python" "$@"
  fi
  local config=configs/single_machine.yaml
  local -a machines=(--num_machines="$NUM_MACHINES")
  if ((NUM_MACHINES > 1)); then
    [[ -n ${MAIN_PROCESS_IP:-} ]] || fail "NUM_MACHINES=$NUM_MACHINES needs MAIN_PROCESS_IP, an address of the first machine"
    [[ $MACHINE_RANK =~ ^[0-9]+$ ]] && ((MACHINE_RANK < NUM_MACHINES)) ||
      fail "MACHINE_RANK: \"$MACHINE_RANK\" must be 0 on the first machine, up to $((NUM_MACHINES - 1)) on the last"
    config=configs/several_machines.yaml
    machines+=(--machine_rank="$MACHINE_RANK" --main_process_ip="$MAIN_PROCESS_IP"
      --main_process_port="${MAIN_PROCESS_PORT:-29500}")
  elif [[ -n ${MAIN_PROCESS_PORT:-} ]]; then
    machines+=(--main_process_port="$MAIN_PROCESS_PORT")
  fi
  exec "$python" scripts/launch.py --config_file "${ACCELERATE_CONFIG:-$config}" \
    --num_processes=$((NUM_PROCESSES * NUM_MACHINES)) "${machines[@]}" "$@"
}

show_gpus() {
  if command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --query-gpu=index,name,memory.total,memory.free --format=csv || true
  else
    echo "no NVIDIA GPU is visible (nvidia-smi is missing); training on what DEVICE finds"
  fi
}
