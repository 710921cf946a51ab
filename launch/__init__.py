"""Launchers for ncclx_py jobs (torchrun, SLURM, emulated clusters) and readable recipes."""
