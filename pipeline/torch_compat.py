"""Private and unstable names of torch, TorchRec and FBGEMM: each stands here once, with a contract test."""
