"""Say which GPU a run would take and how much of it is free; exit code 1 if there is none or too little.

python run_file/free_gpu.py GB
"""

from __future__ import annotations

import sys


def main(needed: str) -> int:
    import torch

    if not torch.cuda.is_available():
        print("GPU: torch sees none (see CUDA_VISIBLE_DEVICES); SCALE=cpu runs a small size without one")
        return 1
    free, total = torch.cuda.mem_get_info(0)
    name = torch.cuda.get_device_name(0)
    print(f"{name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {needed} needed")
    return 0 if free >= float(needed) * 1e9 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
