"""Triton kernels, one file per op family. Nothing here imports Triton until a kernel is asked for."""
