"""Compile the kernel for a GPU that need not be there, and print what came out, a line per mode.

python tests/bench/compile_kernel.py 90          sm_90 (H100, H200); 80 is the A100
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import kernels  # noqa: E402

MODES = [("statistics", True), ("exponentials", False), ("gradients", True)]


def compile_kernel(capability: int, mode: str, entropy: bool, dtype: torch.dtype) -> dict:
    """Registers, shared memory and tensor-core instructions of one mode of the kernel."""
    names = kernels._tile_kernel.arg_names
    block, options = kernels._tile(dtype, shared_memory=166912)
    constants = {"CHANNELS": 768, "MODE": mode, "ENTROPY": entropy, **block}
    short = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {name: "*fp32" for name in names if name.isupper()}
    types |= {name: "i32" for name in names if name.startswith("n_")}
    types |= dict(X=short, W=short, OUT=short, out_stride="i32", scale="fp32")
    types |= {name: "constexpr" for name in constants}
    aligned = [n for n in names if types[n][0] == "*"] + ["out_stride"]
    source = ASTSource(
        kernels._tile_kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": kernel.metadata.shared,
        "instructions": sorted(set(re.findall(r"wgmma|mma\.sync", kernel.asm["ptx"]))),
    }


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        for mode, entropy in MODES:
            print(json.dumps(compile_kernel(int(sys.argv[1]), mode, entropy, dtype)), flush=True)
