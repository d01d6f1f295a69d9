#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine, with token authentication; links and trains a little of the emoji demo
# through `ray job submit`, then stops. As on Kubernetes, the head has no CPUs: all stages run on the other node.
#
# `make cluster-trial` prepares what it needs. Usage: cluster/local_trial.sh [DIRECTORY], where the output goes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(realpath -m "${1:-build/cluster-trial}")
rm -rf "$OUT"
mkdir -p "$OUT"

(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$OUT/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$OUT/token
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1

read -r GCS DASHBOARD HEAD_AGENT WORKER_AGENT < <(python - <<'PYTHON'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(item.getsockname()[1] for item in sockets))
PYTHON
)

TEMPORARY=$(mktemp -d) # not below $OUT: Ray's sockets need short paths
NODES=()
stop() { # only what was started here: `ray stop` would end every Ray of this machine
    kill "${NODES[@]}" 2> /dev/null || true
    wait
    rm -rf "$TEMPORARY"
}
trap stop EXIT

node() { # starts a node in the background: its log, then arguments of `ray start`
    ray start --block --num-gpus=0 --object-store-memory=500000000 "${@:2}" > "$OUT/$1.log" 2>&1 &
    NODES+=($!)
}

healthy() { # waits for a node's agent, at the address that the Kubernetes probes ask, without a token
    python - "$1" <<'PYTHON'
import sys, time
from urllib.error import URLError
from urllib.request import urlopen

for _ in range(240):
    try:
        print(urlopen(f"http://127.0.0.1:{sys.argv[1]}/api/healthz", timeout=5).read().decode())
        break
    except (URLError, OSError):
        time.sleep(0.5)
else:
    sys.exit(f"no node answers at port {sys.argv[1]}")
PYTHON
}

submit() {
    ray job submit --address="http://127.0.0.1:$DASHBOARD" -- "$@"
}

node head --head --num-cpus=0 --temp-dir="$TEMPORARY" --port="$GCS" --dashboard-port="$DASHBOARD" \
    --dashboard-agent-listen-port="$HEAD_AGENT"
healthy "$HEAD_AGENT"
# With the address in their environment, its processes don't look for other clusters of this machine.
RAY_ADDRESS=127.0.0.1:$GCS node worker --num-cpus=4 --address="127.0.0.1:$GCS" \
    --dashboard-agent-listen-port="$WORKER_AGENT" --min-worker-port=0 --max-worker-port=0
healthy "$WORKER_AGENT"

submit python "$PWD/jobs/link_corpus.py" "$PWD/examples/emoji/link.toml" --output "$OUT/linked" \
    --input "$PWD/examples/emoji/sample.parquet" --knowledge-base "$PWD/build/emoji/knowledge_base" \
    --demonstrations "$PWD/build/emoji/demonstrations" --retrieval.num-demonstrations 2
submit python "$PWD/jobs/train.py" "$PWD/jobs/configs/emoji.toml" --output "$OUT/trained" --examples "$OUT/examples" \
    --train "$PWD/examples/emoji/sample.parquet" --knowledge-base "$PWD/build/emoji/knowledge_base" \
    --demonstrations "$PWD/build/emoji/demonstrations" --retrieval.num-demonstrations 2 \
    --optimisation.epochs 1 --optimisation.max-steps 2 --optimisation.batch-size 4 --validation.num-mentions 0

python -m json.tool "$OUT/linked/_report.json"
python -m json.tool "$OUT/trained/_report.json"
