"""A benchmark of the kernels on any machine: python -m pseuzo_kernels.bench

It times updates, perturbations and noise beside a copy of the same bytes, torch.randn, MeZO's loop
in torch, and on a GPU a Triton kernel with tl.randn. It needs torch alone.
"""
