#!/usr/bin/env bash
# Make .venv-peers: this project and the loaders it is compared with, in one environment of their own.
#
#   bash benchmarks/install_peers.sh [FOLDER]        FOLDER defaults to .venv-peers in the repository's root
#
# FFCV is built from source here, so the system must have OpenCV's and libjpeg-turbo's headers (see the check below).
# The numbers of FFCV are those of the libraries that this build finds.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv-peers}"
python="${PYTHON:-python3.11}"  # numba, which FFCV compiles its pipelines with, lags behind the newest Python

missing=()
command -v pkg-config >/dev/null || missing+=(pkg-config)
command -v g++ >/dev/null || missing+=(g++)
if command -v pkg-config >/dev/null; then
    pkg-config --exists opencv4 || missing+=(libopencv-dev)
    pkg-config --exists libturbojpeg || missing+=(libturbojpeg0-dev)
fi
command -v ffmpeg >/dev/null || missing+=(ffmpeg)  # SPDL loads FFmpeg's shared libraries
if ((${#missing[@]})); then
    echo "error: the peers need ${missing[*]} from the system; install them, on Debian or Ubuntu with:" \
        "apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
fi

[[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
# MosaicML Streaming needs transformers 4, which needs an older huggingface_hub than the tests of this project.
grep -v '^huggingface_hub==' constraints.txt >"$venv/constraints.txt"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$venv/constraints.txt")
"${pip[@]}" "setuptools>=77" wheel "pytest>=8.2"
"${pip[@]}" -e ".[stores]" "mosaicml-streaming>=0.11"
"${pip[@]}" "litdata>=0.2.50" "spdl>=0.1.6"
# FFCV asks for opencv-python, which overwrites the cv2 of opencv-python-headless: its other needs are installed by
# name and FFCV itself without its list. `--no-build-isolation`: its setup.py needs distutils as setuptools brings it.
"${pip[@]}" terminaltables pytorch_pfn_extras fastargs assertpy tqdm numba
"${pip[@]}" --no-build-isolation --no-deps "ffcv>=1.0.2"
"$venv/bin/python" - <<'CHECK'
import importlib
import importlib.metadata as metadata

names = {"ffcv": "ffcv", "streaming": "mosaicml-streaming", "litdata": "litdata", "spdl.pipeline": "spdl",
         "spdl.io": "spdl", "webdataset": "webdataset", "s3fs": "s3fs", "nvidia.dali": "nvidia-dali-cuda120", "cv2": "opencv-python-headless",
         "numpy": "numpy", "torch": "torch", "shards": "dermscale"}
for module, package in names.items():
    importlib.import_module(module)
    print(f"{package:24} {metadata.version(package)}")
CHECK
