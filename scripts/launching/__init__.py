"""What train.sh and preflight stand on: the processes of a run, and tables of memory."""
