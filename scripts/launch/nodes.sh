#!/bin/sh
# Train on several machines. Start the same line on each of them, within 10 minutes:
#   RENDEZVOUS=node1:29500 NODES=2 PROCESSES=4 sh scripts/launch/nodes.sh --global_batch 64 --batch_size 8 --data_dir ...
# RENDEZVOUS  one of the machines, by a name that all know, and a port of it that is free and open to the others
# NODES       how many machines; 2:4 begins with 2 at least, takes in up to 4, and goes on while 2 are left
# PROCESSES   processes on each, one a GPU
# RESTARTS    how often all start again from the last checkpoint when one process fails
# ADDRESS     this machine's own address, where its name leads elsewhere (/etc/hosts)
# WAIT        seconds until RENDEZVOUS must be there, 600 by default
# LOGS        a folder for what each process prints; without it, all print here
set -eu
python -m guided_diffusion.system.machines meeting "$RENDEZVOUS" "${WAIT:-600}" || exit 2
# else torch 2.13 tells rank 0's address only to machines that were there at the start
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="${NODES:-2}" --nproc_per_node="${PROCESSES:-1}" --max-restarts="${RESTARTS:-3}" \
  --rdzv_backend=c10d --rdzv_endpoint="$RENDEZVOUS" --rdzv_id="${JOB:-$RENDEZVOUS}" --rdzv_conf=join_timeout=600 \
  ${ADDRESS:+--local-addr="$ADDRESS"} ${LOGS:+--log-dir="$LOGS" --redirects=3} --no-python cimd-train "$@"
