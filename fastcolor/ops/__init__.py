"""The operations: one file each, with checks, choice of backend, autograd and registration with torch.library."""
