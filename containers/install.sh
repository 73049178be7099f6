#!/bin/sh
# Steps of docs/installation.md on Debian and Ubuntu: system packages, environment, package, check.
# Dockerfile, apptainer.def and a plain machine run this script in the root of the repository; without root, step 1 is
# skipped where its packages exist.
#   VENV=/opt/venv          folder of the environment
#   EXTRAS=pretrained       extras of pyproject.toml; empty: none
#   TORCH_INDEX=…/whl/cpu   index of the build of PyTorch; empty: the default of PyPI, on Linux a CUDA build
set -eu
VENV=${VENV-/opt/venv}
EXTRAS=${EXTRAS-pretrained}
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

# 1. system packages
# (libpython3-dev: torchcodec loads the shared library of Python, Triton and torch.compile need the headers)
if command -v ffmpeg >/dev/null && command -v git >/dev/null &&
  python3 -c 'import ctypes, ensurepip, sys; ctypes.CDLL("libpython%d.%d.so.1.0" % sys.version_info[:2])' 2>/dev/null; then
  echo "system packages: installed"
else
  apt-get update
  apt-get install -y --no-install-recommends ca-certificates ffmpeg git libpython3-dev python3 python3-venv
fi

# 2. environment
python3 -m venv "$VENV"

# 3. package, with the versions that were tested together
if [ -n "$TORCH_INDEX" ]; then
  PIP_EXTRA_INDEX_URL="$TORCH_INDEX ${PIP_EXTRA_INDEX_URL:-}"
  export PIP_EXTRA_INDEX_URL
fi
"$VENV/bin/pip" install --no-cache-dir --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

# 4. check, outside the repository
cd /
"$VENV/bin/blueberry" --version
"$VENV/bin/blueberry" doctor
