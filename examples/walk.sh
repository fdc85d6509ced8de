#!/usr/bin/env bash
# From a shop's raw files to an endpoint that answers, in seven commands, each with its time.
#
#     examples/walk.sh [FOLDER]      # by default runs/walk; needs `make env`
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${1:-runs/walk}
RUN=(examples/shop.toml "output=$WORK" "data.path=$WORK/data")
PATH="$PWD/.venv/bin:$PATH"
TIMES=()

timed() { # its time is kept under the command's name
  echo; echo "\$ $*"
  local begin=$EPOCHREALTIME
  "$@"
  TIMES+=("$(awk "BEGIN { printf \"%7.1f s\", $EPOCHREALTIME - $begin }")  ${*:1:3}")
  echo "${TIMES[-1]}"
}

serving() { # until it answers; the last command of seven goes on in the background
  "$@" &
  SERVER=$!
  trap 'kill $SERVER 2>/dev/null; wait $SERVER 2>/dev/null || true' EXIT
  until curl -sf -o /dev/null http://127.0.0.1:8123/readyz; do
    kill -0 $SERVER || { echo "the server has ended" >&2; exit 1; }
    sleep 0.5
  done
}

if [ -e "$WORK" ]; then
  echo "$WORK exists; remove it, or name another folder" >&2
  exit 2
fi
python examples/raw_log.py "$WORK/raw"
head -n 3 "$WORK"/raw/*.csv

timed orchard data import "$WORK/raw/log.csv" "$WORK/data" --items "$WORK/raw/products.csv" --column user=customer --column item=sku --column timestamp=bought --column title=name
timed orchard data sids "$WORK/data" --levels 32,32,32
timed orchard plan "${RUN[@]}"
timed orchard sft "${RUN[@]}"
timed orchard train "${RUN[@]}"
timed orchard export "${RUN[0]}" "$WORK/policy" "${RUN[@]:1}"
timed serving orchard serve "$WORK/policy" serve.port=8123

timed curl -s http://127.0.0.1:8123/v1/recommend -H "content-type: application/json" -d '{"history": [3, 17, 5], "k": 3}'

echo; echo
printf '%s\n' "${TIMES[@]}"
