#!/usr/bin/env bash
# A copy of the tree whose qlora_ext is the one installed in an environment, to run tests and benches on that build.
#
#   tools/test_tree.sh PYTHON FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 folder=$2
rm -rf "$folder"
mkdir -p "$folder"
for path in *; do
  case $path in build | qlora_ext | *.egg-info) ;; *) cp -r "$path" "$folder" ;; esac
done
ln -s "$(cd / && "$python" -c 'import qlora_ext; print(*qlora_ext.__path__)')" "$folder/qlora_ext"
