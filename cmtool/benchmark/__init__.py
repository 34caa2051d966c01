"""Speed and memory of cmtool beside a plain float32 PyTorch implementation of the same methods, in one run."""
