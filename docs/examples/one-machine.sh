#!/bin/sh
# Train on one machine with several processes: sh one-machine.sh 4 mytext.txt
# The package mpich brings mpiexec; `pip install 'npgpt[mpi]'` installs it beside npgpt.
set -eu
exec mpiexec -n "$1" npgpt train "$2" --out model.npz --resume auto
