#!/bin/sh
# Train on several machines with mpiexec of Open MPI, or of MPICH and its kin; start it once:
#   HOSTS=node1,node2 PROCESSES=4 sh scripts/launch/mpi.sh --global_batch 64 --batch_size 8 --data_dir ...
# HOSTS      the machines, or a file with a name a line; all reached by ssh without a password
# PROCESSES  processes on each, one a GPU
# The extra mpi has to be built for this MPI: pip install --no-binary mpi4py mpi4py
set -eu
HOSTS=$(python -m guided_diffusion.system.machines hosts "$HOSTS") || exit 2
count=$(echo "$HOSTS" | tr ',' '\n' | grep -c .)
total=$((count * ${PROCESSES:-1}))
if mpiexec --version | grep -q "Open MPI"; then
  exec mpiexec -n "$total" --host "$(echo "$HOSTS" | sed "s/,/:${PROCESSES:-1},/g"):${PROCESSES:-1}" --map-by slot cimd-train "$@"
fi
exec mpiexec -n "$total" -hosts "$HOSTS" -ppn "${PROCESSES:-1}" cimd-train "$@"
