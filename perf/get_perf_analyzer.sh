#!/usr/bin/env bash
# Puts NVIDIA's perf_analyzer into .perf/ (git-ignored), and leaves the project's own environment alone.
#
#   perf/get_perf_analyzer.sh        # prints the path of the program
#
# The wheels of tritonclient 2.50 and 2.51 carry it, newer ones do not. It needs libcudart.so.12, which comes from PyPI
# (no GPU is needed), and libb64.so.0d, the Debian package libb64-0d: taken from the system, or else, where apt is, from
# the package, which is unpacked and not installed. In Triton's -py3-sdk image perf_analyzer is on the PATH already.
set -euo pipefail
cd "$(dirname "$0")/.."
CLIENT=tritonclient==2.51.0
CUDART=nvidia-cuda-runtime-cu12==12.9.79
place=$PWD/.perf
program=$place/bin/perf_analyzer
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python3

if [ ! -x "$program" ]; then
  rm -rf "$place/wheels" && mkdir -p "$place/wheels" "$place/bin" "$place/lib"
  "$python" -m pip download -qq --disable-pip-version-check --no-deps -d "$place/wheels" "$CLIENT" "$CUDART" >&2
  "$python" - "$place" >&2 <<'PYTHON'
import pathlib, sys, zipfile

place = pathlib.Path(sys.argv[1])
wanted = {"perf_analyzer": place / "bin" / "perf_analyzer.real", "libcudart.so.12": place / "lib" / "libcudart.so.12"}
for wheel in (place / "wheels").glob("*.whl"):
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            target = wanted.pop(pathlib.PurePosixPath(name).name, None)
            if target is not None:
                target.write_bytes(files.read(name))
                target.chmod(0o755)
if wanted:
    sys.exit(f"the wheels hold no {', '.join(wanted)}; was the version changed? tritonclient 2.50 and 2.51 carry it.")
PYTHON
  rm -rf "$place/wheels"
fi

if [ ! -e "$place/lib/libb64.so.0d" ] && ! ldconfig -p 2> /dev/null | grep -q 'libb64\.so\.0d'; then
  scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
  if ! (cd "$scratch" && apt-get download -qq libb64-0d && dpkg-deb -x libb64-0d*.deb .) > "$scratch/log" 2>&1; then
    echo "perf_analyzer needs libb64.so.0d, which this system lacks and apt-get could not fetch; install it" \
      "(Debian and Ubuntu: apt-get install libb64-0d) and run $0 again." >&2
    exit 1
  fi
  cp "$scratch"/usr/lib/*/libb64.so.0d "$place/lib/"
fi

printf '#!/bin/sh\nLD_LIBRARY_PATH="%s${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "%s" "$@"\n' "$place/lib" "$program.real" > "$program"
chmod +x "$program"
"$program" --version > /dev/null || { echo "$program does not run; see what it says above." >&2; exit 1; }
echo "$program"
