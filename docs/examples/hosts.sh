#!/bin/sh
# Train on several machines without a scheduler, such as virtual machines of a cloud: sh hosts.sh hosts.txt mytext.txt
#
# hosts.txt has one machine a line, with the number of processes on it: 10.0.0.4:2
# Needed: SSH without a password from the first machine to the others, and npgpt[mpi] in the same folder on each. The first machine
# reads the text and sends it to the others. The first machine writes the checkpoints. The others read them when a run continues, so
# --out is in a folder that all machines see (NFS, EFS, Filestore).
set -eu
exec mpiexec -f "$1" npgpt train "$2" --out /shared/model.npz --text-from-rank-0 --resume auto --rank-timeout 120
